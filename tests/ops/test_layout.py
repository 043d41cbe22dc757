"""Packed batches."""

from __future__ import annotations

import functools

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_esm_hf import MLXEsmConfig, MLXEsmModel
from mlx_esm_hf.ops.layout import Layout
from tests.marks import needs_kernels
from tests.ops.reference import numbers
from tests.tiny import tiny

pytestmark = [needs_kernels, pytest.mark.usefixtures("on_cpu")]


@pytest.mark.parametrize(
    ("rows", "offsets"),
    [
        (["1110", "1111"], [0, 3, 7]),
        (["0011", "0111"], [0, 2, 5]),
        (["1010", "0000", "0110"], [0, 2, 2, 4]),
        (["0000", "0000"], [0, 0, 0]),
        (["1"], [0, 1]),
    ],
)
def test_packed_layout(rows, offsets):
    mask = np.array([[c == "1" for c in row] for row in rows])
    layout, x = Layout(mask.shape, packed=mask), numbers(*mask.shape, 3)
    assert layout.offsets == offsets
    packed = layout.pack(mx.array(x))
    assert np.array_equal(np.array(packed), x[mask][None])
    assert np.array_equal(np.array(layout.unpack(packed)), x * mask[..., None])
    assert layout.pack(mx.array(x[..., 0])).shape == (1, offsets[-1])


@functools.cache
def model_of(family: str) -> MLXEsmModel:
    mx.random.seed(0)
    config = MLXEsmConfig(**tiny(family, hidden_size=24, num_attention_heads=2, intermediate_size=40))
    model = MLXEsmModel(config)
    model.eval()
    return model


@pytest.mark.parametrize("family", ["ESM-1v", "ESM-2"])
@given(mask=st.integers(1, 19).flatmap(lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1)))
@settings(max_examples=30)
def test_model_on_any_mask_is_each_sequence_alone(family, mask):
    mask = np.array(mask[:6])
    model, ids = model_of(family), np.random.default_rng(0).integers(4, 24, mask.shape)
    ids[~mask] = 1
    positions = np.where(mask, np.cumsum(mask, axis=1) + 1, 1)
    found = np.array(model(ids, mask.astype(int), position_ids=positions).last_hidden_state)
    for row, real in enumerate(mask):
        if real.any():
            alone = model(ids[row : row + 1, real], position_ids=positions[row : row + 1, real]).last_hidden_state
            np.testing.assert_allclose(found[row, real], np.array(alone)[0], rtol=0, atol=2e-6)
