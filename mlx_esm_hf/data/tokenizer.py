"""Loading the tokenizer of a checkpoint."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from mlx_esm_hf.checkpoint.resolve import find_file
from mlx_esm_hf.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(source: str, **hub: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hub repository or a folder.

    Args:
        source: a Hub repository or a folder.
        hub: the arguments of `from_pretrained` that apply to tokenizers, such as `revision` and `token`.

    Raises:
        OSError: there is no tokenizer, the Hub did not answer or refused, or a download was damaged. A damaged download
            is not kept.
        CheckpointError: a file is damaged or incomplete.
    """
    from transformers import AutoTokenizer  # imports torch if it is installed

    # `find_file` compares the checksums of downloads, which transformers does not.
    find_file(source, "tokenizer_config.json", **hub)
    vocabulary = find_file(source, "vocab.txt", **hub) or find_file(source, "tokenizer.json", **hub)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **hub)  # False: do not ask either
    except OSError:
        raise
    except Exception as error:  # transformers fails in many ways on missing or damaged files
        if vocabulary is None:
            place = os.path.join(source, hub["subfolder"]) if hub.get("subfolder") else source
            raise OSError(
                f"{place} has no tokenizer: vocab.txt not found. Save the tokenizer of the base model there with its "
                "save_pretrained."
            ) from error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CheckpointError(
            f"The tokenizer of {source} cannot be loaded ({reason}). It needs vocab.txt and tokenizer_config.json as "
            "written by tokenizer.save_pretrained."
        ) from error
