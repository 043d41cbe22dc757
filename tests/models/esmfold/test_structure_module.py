"""The structure module compared with transformers', and properties of its structures."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from transformers.models.esm.openfold_utils import (
    Rigid as TheirRigid,
)
from transformers.models.esm.openfold_utils import (
    Rotation,
    frames_and_literature_positions_to_atom14_pos,
    torsion_angles_to_frames,
)
from transformers.models.esm.openfold_utils import residue_constants as theirs_constants

from mlx_esm_hf.models.esmfold import structure_module
from mlx_esm_hf.models.esmfold.residue_constants import ATOM14_MASK, RESIDUES, RESTYPES
from mlx_esm_hf.models.esmfold.rigid import Rigid, multiply, rotate, rotation_of
from tests.bar import hold_to_bar
from tests.models.esmfold.folding import Peers, peers

B, L = 2, 11


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Peers:
    return peers(tmp_path_factory.mktemp("fold"))


def inputs() -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    quaternion = random.normal(size=(B, L, 4))
    return {
        "s": random.normal(size=(B, L, 48)),
        "z": random.normal(size=(B, L, L, 24)),
        "quaternion": quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True),
        "translation": random.normal(size=(B, L, 3)) * 3,
        "angles": random.normal(size=(B, L, 7, 2)),
        "aatype": np.arange(B * L).reshape(B, L) % 21,
        "mask": (np.arange(L) < np.array([[L], [L - 4]])).astype(np.float64),
    }


def their_rigid(x: dict[str, torch.Tensor]) -> TheirRigid:
    return TheirRigid(Rotation(quats=x["quaternion"]), x["translation"])


def our_rigid(x: dict[str, mx.array]) -> Rigid:
    return Rigid(rotation_of(x["quaternion"]), x["translation"])


def for_torch(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(x, dtype=torch.long if name == "aatype" else dtype) for name, x in inputs().items()}


def for_mlx() -> dict[str, mx.array]:
    return {name: mx.array(x, mx.int32 if name == "aatype" else mx.float32) for name, x in inputs().items()}


def test_invariant_point_attention(models: Peers) -> None:
    """Compare output and gradients of inputs, frames and weights. transformers' points are float32 in every dtype."""
    weight = np.random.default_rng(4).normal(size=(B, L, 48)) * inputs()["mask"][..., None]
    wanted = ["s", "z", "translation"]

    def torch_results(model: Any, dtype: torch.dtype) -> list[np.ndarray]:
        ipa, x = copy.deepcopy(model.trunk.structure_module.ipa), for_torch(dtype)
        for name in wanted:
            x[name].requires_grad_()
        output = ipa(x["s"], x["z"], their_rigid(x), x["mask"])
        (output * torch.tensor(weight, dtype=dtype)).sum().backward()
        gradients = [p.grad for _, p in sorted(ipa.named_parameters())]
        return [
            output.detach().numpy() * (weight != 0),
            *(g.numpy() for g in [*(x[n].grad for n in wanted), *gradients]),
        ]

    ipa, x = models.ours.trunk.structure_module.ipa, for_mlx()
    parameters = ipa.parameters()

    def loss(parameters: Any, *arrays: mx.array) -> tuple[mx.array, mx.array]:
        ipa.update(parameters)
        given = x | dict(zip(wanted, arrays, strict=True))
        output = ipa(given["s"], given["z"], our_rigid(given), x["mask"])
        return (output * mx.array(weight, mx.float32)).sum(), output

    arrays = [x[name] for name in wanted]
    (_, output), found = mx.value_and_grad(loss, argnums=(0, 1, 2, 3))(parameters, *arrays)
    ipa.update(parameters)
    gradients = [g for _, g in sorted(tree_flatten(found[0]))]
    ours = [np.array(g) for g in (output * (weight != 0), *found[1:], *gradients)]
    theirs, float64 = torch_results(models.theirs, torch.float32), torch_results(models.float64, torch.float64)
    scale = max(np.abs(g).max() for g in float64[1:])
    assert len(ours) == len(theirs)
    for number, trio in enumerate(zip(ours, theirs, float64, strict=True)):
        hold_to_bar(*trio, label=str(number), scale=scale if number else 0)


def test_frames_and_atoms() -> None:
    """Compare the frames of all groups and the atoms for backbone frames and angles, with the gradients of both."""
    random = np.random.default_rng(5)
    weight = random.normal(size=(B, L, 14, 3))

    def torch_results(dtype: torch.dtype) -> list[np.ndarray]:
        x = for_torch(dtype)
        x["angles"].requires_grad_()
        x["translation"].requires_grad_()
        tables = [
            torch.tensor(table, dtype=torch.long if table.dtype == int else dtype)
            for table in (
                theirs_constants.restype_rigid_group_default_frame,
                theirs_constants.restype_atom14_to_rigid_group,
                theirs_constants.restype_atom14_mask,
                theirs_constants.restype_atom14_rigid_group_positions,
            )
        ]
        frames = torsion_angles_to_frames(their_rigid(x), x["angles"], x["aatype"], tables[0])
        positions = frames_and_literature_positions_to_atom14_pos(frames, x["aatype"], *tables)
        (positions * torch.tensor(weight)).sum().backward()
        results = [frames.to_tensor_4x4(), positions, x["angles"].grad, x["translation"].grad]
        return [result.detach().numpy() for result in results]

    x = for_mlx()

    def loss(angles: mx.array, translation: mx.array) -> tuple[mx.array, tuple[mx.array, mx.array]]:
        rigid = our_rigid(x | {"translation": translation})
        frames = structure_module.torsion_angles_to_frames(rigid, angles, x["aatype"])
        positions = structure_module.frames_to_atom14(frames, x["aatype"])
        return (positions * mx.array(weight, mx.float32)).sum(), (frames.to_tensor_4x4(), positions)

    (_, results), gradients = mx.value_and_grad(loss, argnums=(0, 1))(x["angles"], x["translation"])
    trio = [np.array(g) for g in (*results, *gradients)], torch_results(torch.float32), torch_results(torch.float64)
    for number, (ours, theirs, float64) in enumerate(zip(*trio, strict=True)):
        hold_to_bar(ours, theirs, float64, str(number))


def test_invariance(models: Peers) -> None:
    """A rigid motion of all frames does not change invariant point attention."""
    x = for_mlx()
    rigid, turn = our_rigid(x), rotation_of(mx.array([0.5, -0.5, 0.1, 0.7]))
    moved = Rigid(
        multiply(mx.broadcast_to(turn, (B, L, 3, 3)), rigid.rotation),
        rotate(turn, rigid.translation) + mx.array([4.0, -2.0, 9.0]),
    )
    ipa = models.ours.trunk.structure_module.ipa
    before, after = (ipa(x["s"], x["z"], r, x["mask"]) for r in (rigid, moved))
    real = x["mask"][..., None]
    assert mx.abs((before - after) * real).max() < 1e-3 * mx.abs(before).max()
    other = Rigid(rigid.rotation, rigid.translation * 1.1)  # not a rigid motion
    assert mx.abs((before - ipa(x["s"], x["z"], other, x["mask"])) * real).max() > 1e-2


def test_backbones_are_ideal(models: Peers) -> None:
    """Bond lengths and the angle at CA match the table in every residue of every structure."""
    ids = np.arange(20)[None]
    output = models.ours(ids, num_recycles=1)
    nitrogen, alpha, carbon = (np.array(output.positions)[-1, 0, :, i].astype(np.float64) for i in range(3))
    for row, letter in enumerate(RESTYPES):
        ideal = {name: position for name, (_, position) in RESIDUES[letter].atoms.items()}
        wanted = (ideal["N"], ideal["C"])
        found = (nitrogen[row] - alpha[row], carbon[row] - alpha[row])
        for a, b in zip(wanted, found, strict=True):
            assert abs(np.linalg.norm(a) - np.linalg.norm(b)) < 1e-4
        assert abs(wanted[0] @ wanted[1] - found[0] @ found[1]) < 1e-3
    assert 1.44 < np.linalg.norm(nitrogen - alpha, axis=-1).mean() < 1.48
    rotation = np.array(output.sidechain_frames)[-1, 0, :, 0, :3, :3]
    assert np.abs(rotation @ rotation.swapaxes(-1, -2) - np.eye(3)).max() < 1e-5


def test_x_has_no_atoms(models: Peers) -> None:
    output = models.ours([[0, 20, 5]], num_recycles=0)
    assert not np.array(output.positions)[:, 0, 1].any() and not np.array(output.atom37_atom_exists)[0, 1].any()
    exists = np.array(output.positions)[-1, 0].any(axis=-1)
    assert (exists <= (ATOM14_MASK[[0, 20, 5]] > 0)).all()
