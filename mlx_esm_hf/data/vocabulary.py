"""From cleaned sequences to token ids: one for each position."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_esm_hf.data.proteins import tokens


class Vocabulary:
    """What a tokenizer makes of residues.

    Sequences are not given to the tokenizer: it folds a run of unknown letters into one token, and here each position
    has its own.

    Args:
        tokenizer: one of transformers.
        name: of the model, for messages.

    Attributes:
        ids: {token: id}.
        before, after: ids of the tokens around the residues, such as <cls> and <eos>.
        pad, mask: ids of <pad> and <mask>.
    """

    def __init__(self, tokenizer: Any, name: str = ""):
        self.name = name or "this model"
        self.ids: dict[str, int] = tokenizer.get_vocab()
        self.pad: int = tokenizer.pad_token_id
        self.mask: int = tokenizer.mask_token_id
        row: list[int] = tokenizer("A")["input_ids"]
        place = row.index(self.ids["A"])
        self.before, self.after = row[:place], row[place + 1 :]
        self._tokenizer = tokenizer

    @property
    def around(self) -> int:
        """How many tokens a row has besides residues."""
        return len(self.before) + len(self.after)

    def encode(self, sequence: str) -> np.ndarray:
        """Token ids [positions], int32, of a cleaned sequence, without those before and after.

        Raises:
            ValueError: a token that this vocabulary does not have.
        """
        try:
            return np.array([self.ids[token] for token in tokens(sequence)], np.int32)
        except KeyError as error:
            raise ValueError(f"has {error}, which {self.name} has no token for") from None

    def ids_of(self, letters: str) -> np.ndarray:
        """The ids of those of the letters that it has, [letters], int32."""
        return np.array([self.ids[letter] for letter in letters if letter in self.ids], np.int32)

    def decode(self, ids: np.ndarray) -> list[str]:
        """The tokens of ids [positions]."""
        return self._tokenizer.convert_ids_to_tokens(ids.tolist())
