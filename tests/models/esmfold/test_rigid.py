"""Properties of rigid bodies."""

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_esm_hf.models.esmfold.rigid import Rigid, multiply, rotate, rotate_quaternion, rotation_of

SEEDS = st.integers(0, 2**32 - 1)


def random_rigid(seed: int, *shape: int) -> Rigid:
    random = np.random.default_rng(seed)
    quaternion = random.normal(size=(*shape, 4))
    quaternion /= np.linalg.norm(quaternion, axis=-1, keepdims=True)
    translation = random.normal(size=(*shape, 3)) * 10
    return Rigid(rotation_of(mx.array(quaternion.astype(np.float32))), mx.array(translation.astype(np.float32)))


def random_points(seed: int, *shape: int) -> mx.array:
    return mx.array(np.random.default_rng(seed + 1).normal(size=(*shape, 3)).astype(np.float32) * 10)


def close(a: mx.array, b: mx.array, tolerance: float = 1e-4) -> bool:
    return a.shape == b.shape and bool(mx.abs(a - b).max() < tolerance)


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_rotations_are_rotations(seed: int) -> None:
    rotation = np.array(random_rigid(seed, 5).rotation)
    assert np.abs(rotation @ rotation.swapaxes(-1, -2) - np.eye(3)).max() < 1e-5
    assert np.abs(np.linalg.det(rotation) - 1).max() < 1e-5


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_inverse(seed: int) -> None:
    rigid, x = random_rigid(seed, 4), random_points(seed, 4)
    assert close(rigid.invert_apply(rigid.apply(x)), x)
    wide = random_points(seed, 4, 7)
    assert close(rigid.expand().apply(wide)[:, 3], rigid.apply(wide[:, 3]))


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_composition(seed: int) -> None:
    """Composition applies one after the other, equals the product of homogeneous matrices and is associative."""
    a, b, c = (random_rigid(seed + i, 3) for i in range(3))
    x = random_points(seed, 3)
    assert close(a.compose(b).apply(x), a.apply(b.apply(x)))
    left, right = a.compose(b).compose(c), a.compose(b.compose(c))
    assert close(left.rotation, right.rotation) and close(left.translation, right.translation)
    product = np.array(a.to_tensor_4x4()) @ np.array(b.to_tensor_4x4())
    assert np.abs(np.array(a.compose(b).to_tensor_4x4()) - product).max() < 1e-4
    assert close(multiply(a.rotation, a.rotation.swapaxes(-1, -2)), mx.broadcast_to(mx.eye(3), (3, 3, 3)))


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_rotate_quaternion(seed: int) -> None:
    """It composes with the rotation of the normalized change; a zero change has no effect."""
    random = np.random.default_rng(seed)
    start = mx.array([1.0, 0.0, 0.0, 0.0])
    first, second = (mx.array(random.normal(size=3).astype(np.float32)) for _ in range(2))
    one = rotate_quaternion(start, first)
    assert abs(float((one * one).sum()) - 1) < 1e-6
    both = rotation_of(rotate_quaternion(one, second))
    assert close(both, multiply(rotation_of(one), rotation_of(rotate_quaternion(start, second))), 1e-5)
    assert close(rotate_quaternion(one, mx.zeros(3)), one, 1e-6)


def test_quarter_turn() -> None:
    """A quarter turn around x maps y to z."""
    half = 0.5**0.5
    rotation = rotation_of(mx.array([half, half, 0.0, 0.0]))
    assert close(rotate(rotation, mx.array([0.0, 1.0, 0.0])), mx.array([0.0, 0.0, 1.0]), 1e-6)
