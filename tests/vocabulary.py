"""The vocabulary of ESM-1b, ESM-1v and ESM-2, for tokenizers in tests."""

from pathlib import Path

from transformers.models.esm.configuration_esm import get_default_vocab_list


def write_vocabulary(folder):
    """Write `vocab.txt` to the folder and return its path."""
    path = Path(folder) / "vocab.txt"
    path.write_text("\n".join(get_default_vocab_list()))
    return str(path)
