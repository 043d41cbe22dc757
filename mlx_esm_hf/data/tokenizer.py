"""The tokenizer of a checkpoint, loaded with its files checked."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mlx_esm_hf.checkpoint.resolve import find_file
from mlx_esm_hf.errors import CheckpointError


def load_tokenizer(source: str, **hub: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hub repository or a folder.

    Args:
        hub: those arguments of `from_pretrained` that `SHARED` lists.

    Raises:
        OSError: there is none, or the Hub did not answer, or refused; or a file arrived damaged. Nothing of it is kept.
        CheckpointError: a file is damaged or incomplete.
    """
    # Which compares checksums; transformers takes what arrives.
    find_file(source, "tokenizer_config.json", **hub)
    vocabulary = find_file(source, "vocab.txt", **hub) or find_file(source, "tokenizer.json", **hub)
    try:
        return AutoTokenizer.from_pretrained(source, **hub)
    except OSError:
        raise
    except Exception as error:  # what transformers fails with on files that are missing or not what they should be
        if vocabulary is None:
            place = os.path.join(source, hub["subfolder"]) if hub.get("subfolder") else source
            raise OSError(
                f"{place} has no vocab.txt, and so no tokenizer. Put that of the base model beside the weights, with "
                "its save_pretrained."
            ) from error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CheckpointError(
            f"The tokenizer of {source} cannot be loaded ({reason}). It needs vocab.txt and tokenizer_config.json, as "
            "tokenizer.save_pretrained writes them."
        ) from error
