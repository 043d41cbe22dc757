"""Long sequences: large rotary angles, the whole position table, and attention in blocks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity import answers, batch, hold_all, peers, true_float64
from tests.tiny import SIZE


@pytest.mark.parametrize(
    ("family", "residues", "positions"), [("ESM-1b", (998, 600), 1026), ("ESM-2", (1998, 700), 40)], ids=str
)
def test_outputs(tmp_path: Path, family: str, residues: tuple[int, ...], positions: int) -> None:
    model = peers(tmp_path, family, "lm", **SIZE, max_position_embeddings=positions)
    inputs = batch(lengths=residues)
    with true_float64():
        float64 = answers(model.float64, inputs)
    tokens = inputs["input_ids"].shape[1]
    hold_all(model, family, inputs, answers(model.torch, inputs), (f", {tokens} tokens", float64))
