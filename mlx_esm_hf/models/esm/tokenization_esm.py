"""The Hugging Face tokenizer of ESM-1b, ESM-1v and ESM-2, handed on, and the vocabulary of ESM-1 that it lacks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoTokenizer, EsmTokenizer

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.models.esm.configuration_esm import MLXEsm1Config

# fair-esm, `Alphabet.from_architecture("ESM-1")`: four special tokens, the residues, filler up to a multiple of
# eight, and the tokens that are appended.
ESM1_VOCABULARY = (
    *("<null_0>", "<pad>", "<eos>", "<unk>"),
    *"LAGVSERTIDPKQNFYMHWCXBUZO.-",
    *("<null_1>", "<cls>", "<mask>", "<sep>"),
)


# fair-esm, `Alphabet.from_architecture("ESM-1b")`: that of ESM-1b, ESM-1v and ESM-2.
ESM2_VOCABULARY = (
    *("<cls>", "<pad>", "<eos>", "<unk>"),
    *"LAGVSERTIDPKQNFYMHWCXBUZO.-",
    *("<null_1>", "<mask>"),
)


def esm2_tokenizer() -> EsmTokenizer:
    """The tokenizer that ESM-1b, ESM-1v and ESM-2 have, for a model that comes from no checkpoint."""
    with vocabulary_file(ESM2_VOCABULARY) as path:
        return EsmTokenizer(path)


@contextmanager
def vocabulary_file(tokens: Iterable[str]) -> Iterator[str]:
    """A `vocab.txt` for the time being."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "vocab.txt")
        with open(path, "w", encoding="utf-8") as file:
            file.write("\n".join(tokens))
        yield path


class Esm1Tokenizer(EsmTokenizer):
    """`EsmTokenizer` with ESM-1's alphabet of 35 tokens: `<cls>` before the residues, nothing behind them.

    Args:
        vocab_file: a `vocab.txt`, one token a line; ESM-1's own alphabet if None.

    Example:
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
        """1 for a special token, 0 for a residue: one entry for each token that the sequence has."""
        if already_has_special_tokens or self.eos_token_id is not None:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens)
        if token_ids_1 is not None:
            raise UserError("ESM-1 has no token between two sequences: tokenize them one by one.")
        return [1] + [0] * len(token_ids_0)


# AutoTokenizer.from_pretrained finds the tokenizer of a saved ESM-1, too.
AutoTokenizer.register(MLXEsm1Config, slow_tokenizer_class=Esm1Tokenizer)
