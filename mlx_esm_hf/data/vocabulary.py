"""From cleaned sequences to token ids, one for each position."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from mlx_esm_hf.data.alphabets import Pairs, Proteins, alphabet_of
from mlx_esm_hf.data.proteins import CHAIN_BREAK, SPECIAL, STANDARD
from mlx_esm_hf.errors import UserError


class Vocabulary:
    """The token ids that a tokenizer gives to residues.

    Sequences do not go through the tokenizer itself, as it merges a run of unknown letters into one token. Here each
    position has its own.

    Args:
        tokenizer: a tokenizer of transformers.
        name: name of the model, for messages.

    Attributes:
        alphabet: how sequences are cleaned and divided into tokens.
        ids: {token: id}. Special tokens also appear under the names that they have in sequences, such as `<mask>`.
        before: ids of the tokens before the residues, such as <cls>.
        after: ids of the tokens after the residues, such as <eos>.
        pad: id of <pad>.
        mask: id of <mask>.
        chain_break: id of the chain break; −1 if the vocabulary has none.

    Raises:
        UserError: the vocabulary is for no known alphabet, or the tokenizer divides its tokens.
    """

    def __init__(self, tokenizer: Any, name: str = "") -> None:
        self.name = name or "this model"
        self.pad: int = tokenizer.pad_token_id
        self.mask: int = tokenizer.mask_token_id
        special = (self.mask, tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
        named = {token: id for token, id in zip(SPECIAL, special, strict=True) if id is not None}
        self.ids: dict[str, int] = named | tokenizer.get_vocab()
        self.chain_break = self.ids.get(CHAIN_BREAK, -1)
        self.alphabet = alphabet_of(self.ids, self.name)
        example = self.alphabet.example
        row = _ids_of(tokenizer, example, self.name)
        if self.ids[example] not in row:
            raise UserError(
                f"The tokenizer of {self.name} must make one token of each residue, but makes {row} of {example}."
            )
        place = row.index(self.ids[example])
        self.before, self.after = row[:place], row[place + 1 :]
        self._tokenizer = tokenizer

    @property
    def around(self) -> int:
        """The number of tokens in a row besides the residues."""
        return len(self.before) + len(self.after)

    def encode(self, sequence: str) -> np.ndarray:
        """Return the token ids [positions], int32, of a cleaned sequence, without the tokens before and after.

        Raises:
            UserError: the vocabulary does not have a token of the sequence.
        """
        try:
            return np.array([self.ids[token] for token in self.alphabet.tokens(sequence)], np.int32)
        except KeyError as error:
            raise UserError(f"has {error}, for which {self.name} has no token") from None

    def residue_mask(self, ids: np.ndarray) -> np.ndarray:
        """Return which of ids [positions] are residues and not chain breaks, bool [positions]."""
        return ids != self.chain_break

    def residue(self, letter: str) -> int:
        """Return the id of a residue. In a vocabulary of pairs, its structure letter is masked."""
        if not isinstance(self.alphabet, Pairs):
            return self.ids[letter]
        return self.ids.get(f"{letter}#", self.ids["##"])

    def ids_of(self, letters: str) -> np.ndarray:
        """Return the ids [letters], int32, of the letters that are in the vocabulary."""
        return np.array([self.ids[letter] for letter in letters if letter in self.ids], np.int32)

    @cached_property
    def predicted(self) -> np.ndarray:
        """The ids of the tokens that training masks and a perplexity counts, int32 [tokens]."""
        return np.array([self.ids[token] for token in self.alphabet.predicted if token in self.ids], np.int32)

    @cached_property
    def standard(self) -> np.ndarray:
        """The ids of the tokens that stand for something known, such as the 20 residues, int32 [tokens]."""
        return np.array([self.ids[token] for token in self.alphabet.standard], np.int32)

    @cached_property
    def _masked(self) -> np.ndarray:
        ids = np.full(max(self.ids.values()) + 1, self.mask, np.int32)
        for token in self.alphabet.predicted:
            if token in self.ids and (hidden := self.alphabet.masked(token)) != "<mask>":
                ids[self.ids[token]] = self.ids[hidden]
        return ids

    def masked(self, ids: np.ndarray) -> np.ndarray:
        """Return the ids that hide the tokens of ids [positions]: <mask>, or the structure letter alone of a pair."""
        return self._masked[ids]

    def log_probability(self, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Return the log-probability of each token, [positions], float32; of a pair that of its residue.

        Args:
            rows: log-probabilities [positions, vocabulary].
            ids: the ids of the tokens [positions].
        """
        if not isinstance(self.alphabet, Pairs):
            return rows[np.arange(len(ids)), ids]
        names = self.decode(ids)
        groups = [[self.ids[token] for token in self.alphabet.alternatives(name)] for name in names]
        return np.array([np.logaddexp.reduce(row[group]) for row, group in zip(rows, groups, strict=True)], np.float32)

    def decode(self, ids: np.ndarray) -> list[str]:
        """Return the tokens of ids [positions]."""
        return self._tokenizer.convert_ids_to_tokens(ids.tolist())


def refuse_other_tokenizer(
    tokenizer: Any, config: Any, residues: Mapping[str, int] | None = None, name: str = ""
) -> None:
    """Check that a tokenizer belongs to a model, since another one would give the model other residues.

    Args:
        tokenizer: the tokenizer.
        config: the config of the model.
        residues: {residue: id} in the vocabularies of the model's family. Other ids cause a warning, unless the
            `vocab_list` of the config has them.
        name: name of the model, for messages.

    Raises:
        UserError: the tokenizer makes tokens without an embedding, has other ids of special tokens, or other tokens
            than the config's `vocab_list`.
    """
    name, ids = name or "this model", tokenizer.get_vocab()
    # The Nucleotide Transformer has <eos> and <bos> without embeddings, which its tokenizer never adds.
    used = {getattr(tokenizer, f"{kind}_token") for kind in ("cls", "eos", "pad", "mask", "unk")}
    beyond = [token for token, id in ids.items() if id >= config.vocab_size]
    if wrong := [token for token in beyond if token in used or not (token[:1] == "<" and token[-1:] == ">")]:
        raise UserError(
            f"The tokenizer of {name} has {len(ids)} tokens, the model {config.vocab_size}, which has no embedding of "
            f"{', '.join(wrong[:3])}: they do not belong together. Use the tokenizer that was saved with the model."
        )
    for token in ("pad", "mask", "eos"):
        ours, theirs = getattr(tokenizer, f"{token}_token_id"), getattr(config, f"{token}_token_id", None)
        if token == "eos" and ours is None:  # transformers' configs have 2 by default, also where nothing ends a row
            continue
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
                f"The tokenizer of {name} does not match the vocab_list of its config (other tokens or another "
                "order): they do not belong together, or vocab.txt is damaged."
            )
    elif all(residue in ids for residue in STANDARD) and any(
        ids.get(residue, place) != place for residue, place in (residues or {}).items()
    ):
        warnings.warn(
            f"The residues of the vocabulary of {name} have other ids than in its family. Results are wrong unless "
            "the model was trained with this vocabulary.",
            stacklevel=3,
        )


def refuse_other_sequences(vocabulary: Vocabulary, task: str, kinds: tuple[type[Proteins], ...] = (Proteins,)) -> None:
    """Refuse a model for other sequences.

    Args:
        vocabulary: the model's vocabulary.
        task: what needs a model for proteins, for the message.
        kinds: the alphabets that the task knows.

    Raises:
        UserError: the model has another alphabet.
    """
    if type(vocabulary.alphabet) not in kinds:
        raise UserError(
            f"{task} needs a model for {' or '.join(kind.name for kind in kinds)}, but {vocabulary.name} is for "
            f"{vocabulary.alphabet.name}. It works with embed, fill-mask, perplexity, train and finetune."
        )


def refuse_without_mask(vocabulary: Vocabulary) -> None:
    """Check that a vocabulary has a mask token.

    Raises:
        UserError: it has none.
    """
    if vocabulary.mask is None:
        raise UserError(
            f"The tokenizer of {vocabulary.name} has no mask token, which predicting tokens needs. Set mask_token in "
            "its tokenizer_config.json if the model was trained with one."
        )


def _ids_of(tokenizer: Any, sequence: str, name: str) -> list[int]:
    try:
        return tokenizer(sequence)["input_ids"]
    except TypeError as error:  # for example if model_max_length is not a number
        raise UserError(f"The tokenizer of {name} fails ({error}). Its tokenizer_config.json is damaged.") from error
