"""A folder with a checkpoint becomes a repository on the Hub."""

from mlx_esm_hf.hub.publish import Publication, publish

__all__ = ["Publication", "publish"]
