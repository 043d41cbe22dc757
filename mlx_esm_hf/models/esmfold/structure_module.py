"""ESMFold's structure module, which is AlphaFold 2's: from the states of residues and pairs to atoms.

From top to bottom: invariant point attention, the transition, torsion angles, atoms from frames and angles, and the
module. It computes in float32, whatever the dtype of the trunk.

Source: Jumper et al. 2021, Supplement 1.8 (doi:10.1038/s41586-021-03819-2), whose algorithm numbers are used here.

In shapes, B is the batch, L the residues, H the heads and P the points of a head.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_esm_hf import ops
from mlx_esm_hf.modeling_layers import LayerNorm, Linear, Module
from mlx_esm_hf.models.esmfold import residue_constants
from mlx_esm_hf.models.esmfold.rigid import Rigid, rotate, rotate_quaternion, rotation_of


def points(coordinates: mx.array, rigids: Rigid, heads: int) -> mx.array:
    """Return the points [B, L, H, P, 3], in the global frame, of projections [B, L, 3 · H · P] in each residue's frame.

    A projection holds all x coordinates, then all y, then all z.
    """
    x = mx.stack(list(mx.split(coordinates, 3, axis=-1)), axis=-1)
    B, L = x.shape[:2]
    return rigids.expand().apply(x).reshape(B, L, heads, -1, 3)


def squared_distances(a: mx.array, b: mx.array) -> mx.array:
    """Return Σ_p |a_ip − b_jp|², [B, H, L, L], for points [B, L, H, P, 3].

    Coordinates are added one by one: all differences at once would need 3 · P times the memory, and a matrix product
    would lose precision for points that are close together.
    """
    a, b = (x.swapaxes(1, 2).flatten(3) for x in (a, b))
    total = mx.array(0.0)
    for i in range(a.shape[-1]):
        difference = a[..., :, None, i] - b[..., None, :, i]
        total = total + difference * difference
    return total


class MLXEsmFoldInvariantPointAttention(Module):
    """Attention that is invariant under a common rigid motion of all frames (Algorithm 22)."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        c_s, H = config.sequence_dim, config.num_heads_ipa
        self.linear_q = Linear(c_s, H * config.ipa_dim)
        self.linear_kv = Linear(c_s, 2 * H * config.ipa_dim)
        self.linear_q_points = Linear(c_s, 3 * H * config.num_qk_points)
        self.linear_kv_points = Linear(c_s, 3 * H * (config.num_qk_points + config.num_v_points))
        self.linear_b = Linear(config.pairwise_dim, H)
        self.head_weights = mx.zeros(H)
        self.linear_out = Linear(H * (config.pairwise_dim + config.ipa_dim + 4 * config.num_v_points), c_s)

    def __call__(self, s: mx.array, z: mx.array, rigids: Rigid, mask: mx.array) -> mx.array:
        """Return the update of the residue states.

        Args:
            s: [B, L, sequence_dim].
            z: [B, L, L, pairwise_dim].
            rigids: the frame of each residue, [B, L].
            mask: [B, L], 1 for residues, 0 for padding.

        Returns:
            [B, L, sequence_dim].
        """
        config = self.config
        B, L = mask.shape
        H = config.num_heads_ipa
        query = self.linear_q(s).reshape(B, L, H, -1)
        key, value = mx.split(self.linear_kv(s).reshape(B, L, H, -1), 2, axis=-1)
        query_points = points(self.linear_q_points(s), rigids, H)
        key_points, value_points = mx.split(
            points(self.linear_kv_points(s), rigids, H), [config.num_qk_points], axis=-2
        )

        weight = nn.softplus(self.head_weights) * math.sqrt(1 / (3 * (config.num_qk_points * 9 / 2)))
        scores = query.swapaxes(1, 2) @ key.transpose(0, 2, 3, 1) * math.sqrt(1 / (3 * config.ipa_dim))
        scores = scores + math.sqrt(1 / 3) * self.linear_b(z).transpose(0, 3, 1, 2)
        scores = scores - 0.5 * weight[:, None, None] * squared_distances(query_points, key_points)
        scores = scores + config.inf * (mask[:, None, :, None] * mask[:, None, None, :] - 1)
        attention = ops.softmax(scores)

        def attended(x: mx.array) -> mx.array:  # [B, L, H, ...] to [B, L, H, flattened]
            return (attention @ x.flatten(3).swapaxes(1, 2)).swapaxes(1, 2)

        o = attended(value).flatten(2)
        o_points = attended(value_points).reshape(B, L, -1, 3)
        o_points = rigids.expand().invert_apply(o_points)
        norms = mx.sqrt((o_points * o_points).sum(axis=-1) + config.epsilon)
        o_pair = (attention.swapaxes(1, 2) @ z).flatten(2)
        coordinates = [o_points[..., i] for i in range(3)]
        return self.linear_out(mx.concatenate([o, *coordinates, norms, o_pair], axis=-1))


class MLXEsmFoldTransitionLayer(Module):
    """Three dense layers and the residual: [B, L, sequence_dim] to the same shape."""

    def __init__(self, config: Any):
        super().__init__()
        self.linear_1 = Linear(config.sequence_dim, config.sequence_dim)
        self.linear_2 = Linear(config.sequence_dim, config.sequence_dim)
        self.linear_3 = Linear(config.sequence_dim, config.sequence_dim)

    def __call__(self, s: mx.array) -> mx.array:
        """Return the updated states."""
        hidden = self.linear_2(self.linear_1(s, activation="relu"), activation="relu")
        return self.linear_3(hidden, residual=s)


class MLXEsmFoldTransition(Module):
    """Transition layers, dropout and layer norm: [B, L, sequence_dim] to the same shape."""

    def __init__(self, config: Any):
        super().__init__()
        self.layers = [MLXEsmFoldTransitionLayer(config) for _ in range(config.num_transition_layers)]
        self.dropout = nn.Dropout(config.dropout_rate)
        self.layer_norm = LayerNorm(config.sequence_dim)

    def __call__(self, s: mx.array) -> mx.array:
        """Return the updated states."""
        for layer in self.layers:
            s = layer(s)
        return self.layer_norm(self.dropout(s))


class MLXEsmFoldBackboneUpdate(Module):
    """Rotation and translation of each frame: [B, L, sequence_dim] to [B, L, 6] (Algorithm 23)."""

    def __init__(self, config: Any):
        super().__init__()
        self.linear = Linear(config.sequence_dim, 6)

    def __call__(self, s: mx.array) -> mx.array:
        """Return a rotation vector and a translation for each residue."""
        return self.linear(s)


class MLXEsmFoldAngleResnetBlock(Module):
    """ReLU and dense, twice, and the residual: [B, L, resnet_dim] to the same shape."""

    def __init__(self, config: Any):
        super().__init__()
        self.linear_1 = Linear(config.resnet_dim, config.resnet_dim)
        self.linear_2 = Linear(config.resnet_dim, config.resnet_dim)

    def __call__(self, a: mx.array) -> mx.array:
        """Return the updated activations."""
        return self.linear_2(self.linear_1(nn.relu(a), activation="relu"), residual=a)


class MLXEsmFoldAngleResnet(Module):
    """Torsion angles as (sine, cosine), [B, L, 7, 2], before and after normalization (Algorithm 20)."""

    def __init__(self, config: Any):
        super().__init__()
        self.epsilon = config.epsilon
        self.linear_in = Linear(config.sequence_dim, config.resnet_dim)
        self.linear_initial = Linear(config.sequence_dim, config.resnet_dim)
        self.layers = [MLXEsmFoldAngleResnetBlock(config) for _ in range(config.num_resnet_blocks)]
        self.linear_out = Linear(config.resnet_dim, 2 * config.num_angles)

    def __call__(self, s: mx.array, s_initial: mx.array) -> tuple[mx.array, mx.array]:
        """Return the angles before and after normalization."""
        a = self.linear_in(nn.relu(s), residual=self.linear_initial(nn.relu(s_initial)))
        for layer in self.layers:
            a = layer(a)
        a = self.linear_out(nn.relu(a))
        a = a.reshape(*a.shape[:-1], -1, 2)
        length = mx.sqrt(mx.maximum((a * a).sum(axis=-1, keepdims=True), self.epsilon))
        return a, a / length


def torsion_angles_to_frames(backbone: Rigid, angles: mx.array, aatype: mx.array) -> Rigid:
    """Return the frames [B, L, 8] of the rigid groups of each residue (Algorithm 24).

    The rotation of a group that the residue lacks is zero.

    Args:
        backbone: [B, L].
        angles: [B, L, 7, 2], sine and cosine.
        aatype: [B, L].
    """
    sine, cosine = (
        mx.concatenate([mx.full((*aatype.shape, 1), first), angles[..., i]], axis=-1)
        for i, first in enumerate((0.0, 1.0))  # the backbone group is not rotated
    )
    default = mx.array(residue_constants.DEFAULT_FRAMES)[aatype]
    x, y, z = (default[..., :3, i] for i in range(3))
    sine, cosine = sine[..., None], cosine[..., None]
    rotation = mx.stack([x, cosine * y + sine * z, cosine * z - sine * y], axis=-1)
    groups = [Rigid(rotation[..., i, :, :], default[..., i, :3, 3]) for i in range(8)]
    for i in (5, 6, 7):  # each χ group after the first is relative to the previous one
        groups[i] = groups[i - 1].compose(groups[i])
    rotation = mx.stack([group.rotation for group in groups], axis=2)
    translation = mx.stack([group.translation for group in groups], axis=2)
    return backbone.expand().compose(Rigid(rotation, translation))


def frames_to_atom14(frames: Rigid, aatype: mx.array) -> mx.array:
    """Return atom positions [B, L, 14, 3] for frames [B, L, 8] of the rigid groups, with zeros for missing atoms."""
    group = mx.array(residue_constants.ATOM14_GROUPS)[aatype]
    rotation = mx.take_along_axis(frames.rotation, group[..., None, None], axis=2)
    translation = mx.take_along_axis(frames.translation, group[..., None], axis=2)
    ideal = mx.array(residue_constants.ATOM14_POSITIONS)[aatype]
    mask = mx.array(residue_constants.ATOM14_MASK)[aatype]
    return (rotate(rotation, ideal) + translation) * mask[..., None]


class MLXEsmFoldStructureModule(Module):
    """Blocks with shared weights that update a frame for each residue, and the atoms after each block."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.layer_norm_s = LayerNorm(config.sequence_dim)
        self.layer_norm_z = LayerNorm(config.pairwise_dim)
        self.linear_in = Linear(config.sequence_dim, config.sequence_dim)
        self.ipa = MLXEsmFoldInvariantPointAttention(config)
        self.ipa_dropout = nn.Dropout(config.dropout_rate)
        self.layer_norm_ipa = LayerNorm(config.sequence_dim)
        self.transition = MLXEsmFoldTransition(config)
        self.bb_update = MLXEsmFoldBackboneUpdate(config)
        self.angle_resnet = MLXEsmFoldAngleResnet(config)

    def __call__(self, s: mx.array, z: mx.array, aatype: mx.array, mask: mx.array) -> dict[str, mx.array]:
        """Run all blocks.

        Args:
            s: [B, L, sequence_dim].
            z: [B, L, L, pairwise_dim].
            aatype: [B, L].
            mask: [B, L].

        Returns:
            `frames`, `sidechain_frames`, `unnormalized_angles`, `angles`, `positions` and `states` of each block; see
            `MLXEsmForProteinFoldingOutput`.
        """
        scale = self.config.trans_scale_factor
        mask = mask.astype(mx.float32)
        s, z = self.layer_norm_s(s.astype(mx.float32)), self.layer_norm_z(z.astype(mx.float32))
        s_initial = s
        s = self.linear_in(s)
        quaternion = mx.broadcast_to(mx.array([1.0, 0.0, 0.0, 0.0]), (*aatype.shape, 4))
        rigids = Rigid(rotation_of(quaternion), mx.zeros((*aatype.shape, 3)))
        blocks = []
        for _ in range(self.config.num_blocks):
            s = self.layer_norm_ipa(self.ipa_dropout(s + self.ipa(s, z, rigids, mask)))
            s = self.transition(s)
            update = self.bb_update(s)
            quaternion = rotate_quaternion(quaternion, update[..., :3])
            rigids = Rigid(rotation_of(quaternion), rigids.apply(update[..., 3:]))

            in_angstrom = Rigid(rigids.rotation, rigids.translation * scale)
            unnormalized_angles, angles = self.angle_resnet(s, s_initial)
            frames = torsion_angles_to_frames(in_angstrom, angles, aatype)
            blocks.append(
                {
                    "frames": mx.concatenate([quaternion, in_angstrom.translation], axis=-1),
                    "sidechain_frames": frames.to_tensor_4x4(),
                    "unnormalized_angles": unnormalized_angles,
                    "angles": angles,
                    "positions": frames_to_atom14(frames, aatype),
                    "states": s,
                }
            )
            # A block's gradient flows to previous frames through their translations only.
            quaternion = mx.stop_gradient(quaternion)
            rigids = Rigid(mx.stop_gradient(rigids.rotation), rigids.translation)
        return {name: mx.stack([block[name] for block in blocks]) for name in blocks[0]}
