"""From cleaned sequences to token ids: one for each position."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_esm_hf.data.proteins import CHAIN_BREAK, SPECIAL, STANDARD, tokens
from mlx_esm_hf.errors import UserError


class Vocabulary:
    """What a tokenizer makes of residues.

    Sequences are not given to the tokenizer: it folds a run of unknown letters into one token, and here each position
    has its own.

    Args:
        tokenizer: one of transformers.
        name: of the model, for messages.

    Attributes:
        ids: {token: id}. Special tokens have the names that they have in sequences, such as `<mask>`, beside those that
            the tokenizer has for them.
        before, after: ids of the tokens around the residues, such as <cls> and <eos>.
        pad, mask: ids of <pad> and <mask>.
        chain_break: that of the break between chains; −1, it has none.

    Raises:
        ValueError: the tokenizer knows no residues.
    """

    def __init__(self, tokenizer: Any, name: str = ""):
        self.name = name or "this model"
        self.pad: int = tokenizer.pad_token_id
        self.mask: int = tokenizer.mask_token_id
        special = (self.mask, tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
        named = {token: id for token, id in zip(SPECIAL, special, strict=True) if id is not None}
        self.ids: dict[str, int] = named | tokenizer.get_vocab()
        self.chain_break = self.ids.get(CHAIN_BREAK, -1)
        if missing := [residue for residue in STANDARD if residue not in self.ids]:
            raise UserError(
                f"The vocabulary of {self.name} lacks the residues {', '.join(missing)}: its tokenizer is not one of "
                "proteins, or its vocab.txt is damaged."
            )
        row = _ids_of_a_residue(tokenizer, self.name)
        if self.ids["A"] not in row:
            raise UserError(f"The tokenizer of {self.name} does not make one token of a residue, but {row} of A.")
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
            raise UserError(f"has {error}, which {self.name} has no token for") from None

    def residues(self, ids: np.ndarray) -> np.ndarray:
        """Which of ids [positions] are residues, bool [positions]: all but the breaks between chains."""
        return ids != self.chain_break

    def ids_of(self, letters: str) -> np.ndarray:
        """The ids of those of the letters that it has, [letters], int32."""
        return np.array([self.ids[letter] for letter in letters if letter in self.ids], np.int32)

    def decode(self, ids: np.ndarray) -> list[str]:
        """The tokens of ids [positions]."""
        return self._tokenizer.convert_ids_to_tokens(ids.tolist())


def refuse_other_tokenizer(
    tokenizer: Any, config: Any, residues: Mapping[str, int] | None = None, name: str = ""
) -> None:
    """Refuse the tokenizer of another model: the answers would be those to other residues.

    Args:
        residues: their ids in the vocabularies of the model's family. Others are warned of, unless the config's own
            `vocab_list` has them.

    Raises:
        ValueError: it has more tokens than the config says, special ones elsewhere, or not those of `vocab_list`.
    """
    name, ids = name or "this model", tokenizer.get_vocab()
    if len(ids) > config.vocab_size:
        raise UserError(
            f"The tokenizer of {name} has {len(ids)} tokens, the model {config.vocab_size}: they do not belong "
            "together."
        )
    for token in ("pad", "mask", "eos"):
        ours, theirs = getattr(tokenizer, f"{token}_token_id"), getattr(config, f"{token}_token_id", None)
        if theirs is not None and ours not in (theirs if isinstance(theirs, list) else [theirs]):
            raise UserError(
                f"The tokenizer of {name} has <{token}> at {ours}, the config at {theirs}: they do not belong "
                "together, or vocab.txt is damaged."
            )
    order = sorted(ids, key=ids.__getitem__)
    expected = getattr(config, "vocab_list", None)
    if expected is not None:
        if order != list(expected):
            raise UserError(
                f"The tokenizer of {name} has other tokens than the vocab_list of its config, or in another order: "
                "they do not belong together, or vocab.txt is damaged."
            )
    elif any(ids.get(residue, place) != place for residue, place in (residues or {}).items()):
        warnings.warn(
            f"The vocabulary of {name} has its residues in another order than its family. The answers are wrong "
            "unless the model was trained with it.",
            stacklevel=3,
        )


def _ids_of_a_residue(tokenizer: Any, name: str) -> list[int]:
    try:
        return tokenizer("A")["input_ids"]
    except TypeError as error:  # such as a model_max_length that is no number
        raise UserError(f"The tokenizer of {name} fails ({error}): its tokenizer_config.json is damaged.") from error
