"""Rigid bodies: rotations and translations of points, in float32 and without matrix products.

Some GPUs round matrix products to TF32, which gives visible errors over distances of 40 Å.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


def rotate(rotation: mx.array, x: mx.array) -> mx.array:
    """Return rotation [..., 3, 3] · x [..., 3]."""
    return (rotation * x[..., None, :]).sum(axis=-1)


def multiply(a: mx.array, b: mx.array) -> mx.array:
    """Return a · b for rotations [..., 3, 3]."""
    return (a[..., :, :, None] * b[..., None, :, :]).sum(axis=-2)


def rotation_of(quaternion: mx.array) -> mx.array:
    """Return the rotation [..., 3, 3] of a unit quaternion (w, x, y, z) [..., 4]."""
    w, x, y, z = (quaternion[..., i] for i in range(4))
    rows = [
        [w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z],
    ]
    return mx.stack([mx.stack(row, axis=-1) for row in rows], axis=-2)


def rotate_quaternion(quaternion: mx.array, vector: mx.array) -> mx.array:
    """Compose a unit quaternion [..., 4] with the rotation of (1, b, c, d), which need not have length 1.

    Args:
        quaternion: (w, x, y, z).
        vector: (b, c, d), [..., 3].

    Source: Jumper et al. 2021, Supplement, Algorithm 23.
    """
    w, x, y, z = (quaternion[..., i] for i in range(4))
    b, c, d = (vector[..., i] for i in range(3))
    change = [
        -x * b - y * c - z * d,
        w * b + y * d - z * c,
        w * c - x * d + z * b,
        w * d + x * c - y * b,
    ]
    quaternion = quaternion + mx.stack(change, axis=-1)
    return quaternion / mx.sqrt((quaternion * quaternion).sum(axis=-1, keepdims=True))


class Rigid(NamedTuple):
    """A transformation x ↦ rotation · x + translation."""

    rotation: mx.array  # [..., 3, 3]
    translation: mx.array  # [..., 3]

    def apply(self, x: mx.array) -> mx.array:
        """Transform points x [..., 3] from this frame to the global frame."""
        return rotate(self.rotation, x) + self.translation

    def invert_apply(self, x: mx.array) -> mx.array:
        """Transform points x [..., 3] from the global frame to this frame."""
        return rotate(self.rotation.swapaxes(-1, -2), x - self.translation)

    def compose(self, other: Rigid) -> Rigid:
        """Return the transformation that applies `other` first, then this one."""
        return Rigid(multiply(self.rotation, other.rotation), self.apply(other.translation))

    def expand(self, axes: int = 1) -> Rigid:
        """Add axes of length 1, over which points are broadcast."""
        shape = self.translation.shape[:-1] + (1,) * axes
        return Rigid(self.rotation.reshape(*shape, 3, 3), self.translation.reshape(*shape, 3))

    def to_tensor_4x4(self) -> mx.array:
        """Return homogeneous transformations [..., 4, 4]."""
        top = mx.concatenate([self.rotation, self.translation[..., None]], axis=-1)
        bottom = mx.broadcast_to(mx.array([0.0, 0.0, 0.0, 1.0]), (*top.shape[:-2], 1, 4))
        return mx.concatenate([top, bottom], axis=-2)
