"""The tokenizer of ESM-1, which transformers lacks, and that of ESM-1b, ESM-1v and ESM-2 without a checkpoint."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoTokenizer, EsmTokenizer

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.models.esm.configuration_esm import MLXEsm1Config

RESIDUES = "LAGVSERTIDPKQNFYMHWCXBUZO"

# fair-esm's `Alphabet.from_architecture("ESM-1")`: four special tokens, residues, padding to a multiple of eight, and
# appended tokens.
ESM1_VOCABULARY = (
    *("<null_0>", "<pad>", "<eos>", "<unk>"),
    *(RESIDUES + ".-"),
    *("<null_1>", "<cls>", "<mask>", "<sep>"),
)

# fair-esm's `Alphabet.from_architecture("ESM-1b")`, which ESM-1b, ESM-1v and ESM-2 share.
ESM2_VOCABULARY = (
    *("<cls>", "<pad>", "<eos>", "<unk>"),
    *(RESIDUES + ".-"),
    *("<null_1>", "<mask>"),
)

# {residue: id}, the same in all published vocabularies of ESM and ESMC.
RESIDUE_IDS = {residue: ESM2_VOCABULARY.index(residue) for residue in RESIDUES}


def esm2_tokenizer() -> EsmTokenizer:
    """Return the tokenizer of ESM-1b, ESM-1v and ESM-2, for a model without a checkpoint."""
    with vocabulary_file(ESM2_VOCABULARY) as path:
        return EsmTokenizer(path)


@contextmanager
def vocabulary_file(tokens: Iterable[str]) -> Iterator[str]:
    """Write a temporary `vocab.txt` and yield its path."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "vocab.txt")
        with open(path, "w", encoding="utf-8") as file:
            file.write("\n".join(tokens))
        yield path


class Esm1Tokenizer(EsmTokenizer):
    """`EsmTokenizer` with ESM-1's alphabet of 35 tokens: `<cls>` before the residues and no `<eos>` after them.

    Args:
        vocab_file: a `vocab.txt` with one token per line; None for ESM-1's alphabet.
        eos_token: a token to append; None for ESM-1's format.
        kwargs: see `EsmTokenizer`.

    Example:
        >>> from mlx_esm_hf.models.esm.tokenization_esm import Esm1Tokenizer
        >>> Esm1Tokenizer()("MKT")["input_ids"]
        [32, 20, 15, 11]
    """

    def __init__(self, vocab_file: str | os.PathLike[str] | None = None, eos_token: str | None = None, **kwargs: Any):
        if vocab_file is not None:
            super().__init__(vocab_file, eos_token=eos_token, **kwargs)
            return
        with vocabulary_file(ESM1_VOCABULARY) as path:
            super().__init__(path, eos_token=eos_token, **kwargs)

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """Return 1 for each special token and 0 for each residue of the tokenized sequence."""
        if already_has_special_tokens or self.eos_token_id is not None:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens)
        if token_ids_1 is not None:
            raise UserError("ESM-1 has no separator token for a pair of sequences: tokenize them separately.")
        return [1] + [0] * len(token_ids_0)


# Lets AutoTokenizer.from_pretrained load the tokenizer of a saved ESM-1.
AutoTokenizer.register(MLXEsm1Config, slow_tokenizer_class=Esm1Tokenizer)
