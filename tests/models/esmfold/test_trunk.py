"""The trunk of ESMFold compared with transformers, each part with its gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from transformers.models.esm.modeling_esmfold import EsmFoldingTrunk

from mlx_esm_hf.models.esmfold.trunk import recycle_bins
from mlx_esm_hf.ops import pairs
from tests.bar import hold_to_bar
from tests.models.esmfold.folding import Peers, peers, real, residues


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Peers:
    return peers(tmp_path_factory.mktemp("fold"))


def pair(x: np.ndarray) -> np.ndarray:
    """Return the mask of pairs [B, L, L] for a mask [B, L]."""
    return x[:, :, None] * x[:, None]


Call = Callable[..., Any]

POSITIONS = np.array([[0, 1, 2, 3, 12, 13, 14, 15, 30], [5, 6, 7, 8, 9, 11, 0, 0, 0]])

# {part: (path, kinds of the inputs, call of our module, call of theirs, kind of the output)}
PARTS: dict[str, tuple[str, str, Call, Call, str]] = {
    "triangle multiplication, outgoing": (
        *("trunk.blocks.0.tri_mul_out", "z"),
        *(lambda m, z, mask: m(z, mask), lambda m, z, mask: m(z, mask=pair(mask)), "z"),
    ),
    "triangle multiplication, incoming": (
        *("trunk.blocks.0.tri_mul_in", "z"),
        *(lambda m, z, mask: m(z, mask), lambda m, z, mask: m(z, mask=pair(mask)), "z"),
    ),
    "triangle attention, starting": (
        *("trunk.blocks.0.tri_att_start", "z"),
        *(lambda m, z, mask: m(z, mask), lambda m, z, mask: m(z, mask=pair(mask)), "z"),
    ),
    "triangle attention, ending, by 3 rows": (
        *("trunk.blocks.0.tri_att_end", "z"),
        *(lambda m, z, mask: m(z, mask, chunk_size=3), lambda m, z, mask: m(z, mask=pair(mask)), "z"),
    ),
    "transition of pairs, by 2 rows": (
        *("trunk.blocks.0.mlp_pair", "z"),
        *(lambda m, z, mask: m(z, 2), lambda m, z, mask: m(z), "z"),
    ),
    "transition of residues": (
        *("trunk.blocks.0.mlp_seq", "s", lambda m, s, mask: m(s), lambda m, s, mask: m(s), "s"),
    ),
    "sequence to pair": (
        *("trunk.blocks.0.sequence_to_pair", "s", lambda m, s, mask: m(s), lambda m, s, mask: m(s), "z"),
    ),
    "pair to sequence": (
        *("trunk.blocks.0.pair_to_sequence", "z", lambda m, z, mask: m(z), lambda m, z, mask: m(z), "z"),
    ),
    "attention of residues": (
        *("trunk.blocks.0.seq_attention", "sb"),
        lambda m, s, bias, mask: m(s, mask, bias),
        lambda m, s, bias, mask: m(s, mask=mask, bias=bias)[0],
        "s",
    ),
    "block": (
        *("trunk.blocks.1", "sz"),
        lambda m, s, z, mask: m(s, z, mask)[1],
        lambda m, s, z, mask: m(s, z, mask=mask)[1],
        "z",
    ),
    "angles": (
        *("trunk.structure_module.angle_resnet", "tt"),
        *(lambda m, s, t, mask: m(s, t)[1], lambda m, s, t, mask: m(s, t)[1], "s"),
    ),
    "backbone update": (
        *("trunk.structure_module.bb_update", "t", lambda m, s, mask: m(s), lambda m, s, mask: m(s), "s"),
    ),
    "relative positions": (
        *("trunk.pairwise_positional_embedding", ""),
        lambda m, mask: m(mx.array(POSITIONS), mask.astype(mx.int32)),
        lambda m, mask: m(torch.tensor(POSITIONS), mask.long()),
        "z",
    ),
    "structure transition": (
        *("trunk.structure_module.transition", "t", lambda m, s, mask: m(s), lambda m, s, mask: m(s), "s"),
    ),
}


def module_at(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = model[int(name)] if name.isdecimal() else getattr(model, name)
    return model


@pytest.mark.parametrize("part", PARTS)
def test_part(models: Peers, part: str) -> None:
    """Compare its output at real residues, and the gradients of its inputs and weights."""
    path, kinds, call_ours, call_theirs, result = PARTS[part]
    random = np.random.default_rng(1)
    B, L = 2, 9
    mask = (np.arange(L) < np.array([[9], [6]])).astype(np.float32)
    shapes = {"s": (B, L, 64), "z": (B, L, L, 32), "b": (B, L, L, 2), "t": (B, L, 48)}
    inputs = [random.normal(size=shapes[kind]).astype(np.float32) for kind in kinds]
    kept = pair(mask) if result == "z" else mask
    weight: np.ndarray = np.zeros(0)

    def torch_results(model: Any) -> list[np.ndarray]:
        nonlocal weight
        module = copy.deepcopy(module_at(model, path))
        dtype = next(module.parameters()).dtype
        tensors = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in inputs]
        output = call_theirs(module, *tensors, torch.tensor(mask, dtype=dtype))
        if not weight.size:
            weight = random.normal(size=output.shape).astype(np.float32)
            weight *= kept.reshape(*kept.shape, *[1] * (output.ndim - kept.ndim))
        (output * torch.tensor(weight)).sum().backward()
        gradients = {name: p.grad.numpy() for name, p in module.named_parameters()}
        values = output.detach().numpy() * (weight != 0)
        return [values, *(x.grad.numpy() for x in tensors), *(gradients[name] for name in sorted(gradients))]

    def our_results(model: Any) -> list[np.ndarray]:
        module = module_at(model, path)
        parameters = module.parameters()

        def loss(parameters: Any, *arrays: mx.array) -> tuple[mx.array, mx.array]:
            module.update(parameters)
            output = call_ours(module, *arrays, mx.array(mask))
            return (output * mx.array(weight)).sum(), output

        arrays = [mx.array(x) for x in inputs]
        (_, output), found = mx.value_and_grad(loss, argnums=tuple(range(len(arrays) + 1)))(parameters, *arrays)
        module.update(parameters)
        found = found if arrays else (found,)  # MLX returns one gradient without a tuple
        gradients = dict(tree_flatten(found[0]))
        return [np.array(x) for x in (output * (weight != 0), *found[1:], *(gradients[n] for n in sorted(gradients)))]

    theirs, float64 = torch_results(models.theirs), torch_results(models.float64)
    ours = our_results(models.ours)
    assert len(ours) == len(theirs)
    scale = max(np.abs(x).max() for x in float64[1:])
    hold_to_bar(ours[0], theirs[0], float64[0], "output")
    for number, trio in enumerate(zip(ours[1:], theirs[1:], float64[1:], strict=True)):
        hold_to_bar(*trio, label=f"gradient {number}", scale=scale)


RECYCLED = ("recycle_s_norm", "recycle_z_norm", "recycle_disto")  # layers that receive the recycled states


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_one_pass(models: Peers, before: int) -> None:
    """Compare one pass from the states and bins of transformers' previous passes, so that errors do not accumulate."""
    ids, mask, positions = residues([33])
    s = np.random.default_rng(7).normal(size=(1, 33, 64)).astype(np.float32)
    states = [np.zeros_like(s), np.zeros((1, 33, 33, 32), dtype=np.float32), np.zeros((1, 33, 33), dtype=np.int64)]
    inputs = [torch.tensor(x) for x in (ids, positions, mask)]

    @torch.no_grad()
    def torch_pass(model: Any, states: list[np.ndarray], num_recycles: int = 0) -> Any:
        """Run the trunk with the given states, if any, instead of its initial zeros."""
        trunk, dtype = model.trunk, model.esm_s_combine.dtype
        given = [torch.tensor(x, dtype=None if x.dtype == np.int64 else dtype) for x in states]
        hooks = [
            getattr(trunk, name).register_forward_pre_hook(lambda _, args, x=x: (x,))
            for name, x in zip(RECYCLED, given, strict=False)
        ]
        s_z = torch.zeros(1, 33, 33, 32, dtype=dtype)
        output = trunk(torch.tensor(s, dtype=dtype), s_z, *inputs, no_recycles=num_recycles)
        for hook in hooks:
            hook.remove()
        return output

    if before:
        exact = torch_pass(models.float64, [], before - 1)
        bins = models.float64.trunk.distogram(exact["positions"][-1][:, :, :3], 3.375, 21.375, 15)
        states = [exact["s_s"].numpy().astype(np.float32), exact["s_z"].numpy().astype(np.float32), bins.numpy()]
        assert len(np.unique(states[2])) > 8
    theirs, float64 = (torch_pass(model, states) for model in (models.theirs, models.float64))
    given = [mx.array(x) for x in (s, *states, ids, positions, mask)]
    ours = models.ours.trunk.run(*given)
    assert len(ours) == 8
    length = np.linalg.norm(float64["unnormalized_angles"], axis=-1, keepdims=True)
    for name in ours:
        # Dividing by a small length amplifies a small error.
        factor = np.minimum(length, 1) if name == "angles" else 1
        hold_to_bar(*(np.asarray(output[name]) * factor for output in (ours, theirs, float64)), label=name)


def test_recycle_bins() -> None:
    """The bins match transformers' for distances that rounding does not move across a boundary."""
    random = np.random.default_rng(8)
    backbone = random.normal(size=(2, 60, 1, 3)) * 6 + random.normal(size=(2, 60, 3, 3))
    theirs = EsmFoldingTrunk.distogram(torch.tensor(backbone), 3.375, 21.375, 15)
    beside = EsmFoldingTrunk.distogram(torch.tensor(backbone * (1 + 1e-5)), 3.375, 21.375, 15)
    clear = (theirs == beside).numpy()
    ours = np.array(recycle_bins(mx.array(backbone.astype(np.float32))))
    assert clear.mean() > 0.99 and (ours == theirs.numpy())[clear].all()
    assert set(np.unique(ours)) == set(range(15))


def test_chunk_size_does_not_change_results(models: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask, positions = residues([19, 12])
    whole = models.ours(ids, mask, positions, num_recycles=1)
    monkeypatch.setattr(pairs, "ELEMENTS_AT_A_TIME", 1)
    for chunk_size in (None, 4):
        models.ours.set_chunk_size(chunk_size)
        chunked = models.ours(ids, mask, positions, num_recycles=1)
        for name in ("positions", "s_z"):
            assert np.abs(real(name, chunked[name], 0, 19) - real(name, whole[name], 0, 19)).max() < 1e-3
    models.ours.set_chunk_size(None)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, or None, got 0"):
        models.ours.set_chunk_size(0)


def test_recycles(models: Peers) -> None:
    """None runs as many passes as the config says, and each pass changes the structure."""
    ids = residues([12])[0]
    default, three, two = (models.ours(ids, num_recycles=n).positions for n in (None, 2, 1))
    assert mx.array_equal(default, three) and mx.abs(three - two).max() > 0.5
    with pytest.raises(ValueError, match="num_recycles must be at least 0, got -1"):
        models.ours(ids, num_recycles=-1)
