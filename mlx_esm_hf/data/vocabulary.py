"""From cleaned sequences to token ids: one for each position."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from mlx_esm_hf.data.proteins import STANDARD, tokens

ORDER = "LAGVSERTIDPKQNFYMHWCXBUZO"  # of the residues in all of ESM's vocabularies, behind four special tokens


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

    Raises:
        ValueError: the tokenizer knows no residues.
    """

    def __init__(self, tokenizer: Any, name: str = ""):
        self.name = name or "this model"
        self.ids: dict[str, int] = tokenizer.get_vocab()
        self.pad: int = tokenizer.pad_token_id
        self.mask: int = tokenizer.mask_token_id
        if missing := [residue for residue in STANDARD if residue not in self.ids]:
            raise ValueError(
                f"The vocabulary of {self.name} lacks the residues {', '.join(missing)}: its tokenizer is not one of "
                "proteins, or its vocab.txt is damaged."
            )
        row: list[int] = tokenizer("A")["input_ids"]
        if self.ids["A"] not in row:
            raise ValueError(f"The tokenizer of {self.name} does not make one token of a residue, but {row} of A.")
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

    def decode(self, ids: np.ndarray) -> list[str]:
        """The tokens of ids [positions]."""
        return self._tokenizer.convert_ids_to_tokens(ids.tolist())


def refuse_other_tokenizer(tokenizer: Any, config: Any, name: str = "") -> None:
    """Refuse the tokenizer of another model: the answers would be those to other residues. Warn of one whose residues
    are not where ESM has them.

    Raises:
        ValueError: it has more tokens than the config says, or special ones elsewhere.
    """
    name, ids = name or "this model", tokenizer.get_vocab()
    if len(ids) > config.vocab_size:
        raise ValueError(
            f"The tokenizer of {name} has {len(ids)} tokens, the model {config.vocab_size}: they do not belong "
            "together."
        )
    for token in ("pad", "mask", "eos"):
        ours, theirs = getattr(tokenizer, f"{token}_token_id"), getattr(config, f"{token}_token_id", None)
        if theirs is not None and ours not in (theirs if isinstance(theirs, list) else [theirs]):
            raise ValueError(
                f"The tokenizer of {name} has <{token}> at {ours}, the config at {theirs}: they do not belong "
                "together, or vocab.txt is damaged."
            )
    if all(residue in ids for residue in ORDER) and [ids[residue] for residue in ORDER] != list(
        range(4, 4 + len(ORDER))
    ):
        warnings.warn(
            f"The vocabulary of {name} has its residues in another order than ESM's. The answers are wrong unless the "
            "model was trained with it.",
            stacklevel=3,
        )
