"""Publishing the checkpoint in a folder as a repository on the Hub."""

from mlx_esm_hf.hub.publish import Publication, publish

__all__ = ["Publication", "publish"]
