"""ESMFold beside transformers': every output, every part alone with its gradient, and what is right here alone."""

from __future__ import annotations

import copy
import io
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from Bio.PDB import PDBParser
from Bio.SeqUtils import seq1
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from safetensors.torch import load_file, save_file
from transformers import EsmForProteinFolding
from transformers.models.esm.modeling_esmfold import EsmFoldingTrunk

from mlx_esm_hf import MLXEsmConfig, MLXEsmForMaskedLM, MLXEsmForProteinFolding
from mlx_esm_hf.errors import CheckpointError
from mlx_esm_hf.models.esmfold import modeling_esmfold
from mlx_esm_hf.models.esmfold.residue_constants import RESIDUES, RESTYPES
from mlx_esm_hf.ops import pairs
from tests.bar import hold_to_bar
from tests.checkpoints import python_of_transformers_4
from tests.marks import needs_cpu
from tests.models.esmfold.folding import Peers, peers, residues
from tests.tiny import tiny_folding


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Peers:
    return peers(tmp_path_factory.mktemp("fold"))


@pytest.fixture(scope="module")
def half_stem(tmp_path_factory: pytest.TempPathFactory) -> Peers:
    return peers(tmp_path_factory.mktemp("half"), fp16_esm=True)


PER_BLOCK = {"frames", "sidechain_frames", "unnormalized_angles", "angles", "positions", "states", "lddt_head"}
PAIRS = {"s_z", "distogram_logits", "ptm_logits", "aligned_confidence_probs", "predicted_aligned_error"}


def real(name: str, value: Any, row: int, length: int) -> np.ndarray:
    """A field's values for the residues of one protein."""
    value = np.asarray(value)
    if value.ndim == 0:
        return value
    value = value[:, row] if name in PER_BLOCK else value[row]
    if name in PAIRS:
        return value[:length, :length]
    return value[:, :length] if name in PER_BLOCK else value[:length]


def hold_outputs(models: Peers, lengths: list[int], num_recycles: int | None, **more: Any) -> None:
    """Each field of the residues that are no padding; pTM is compared where there is one protein."""
    ids, mask, positions = residues(lengths)
    ours = models.ours(ids, mask, positions, num_recycles=num_recycles)
    inputs = [torch.tensor(x) for x in (ids, mask, positions)]
    with torch.no_grad():
        theirs, float64 = (m(*inputs, num_recycles=num_recycles) for m in (models.theirs, models.float64))
    assert set(theirs.keys()) | {"mean_plddt"} == set(ours.keys())
    for name in theirs:
        assert ours[name].shape == ((len(lengths),) if name == "ptm" else theirs[name].shape), name
        if name == "ptm":
            if len(lengths) == 1:
                # A mean of probabilities, so that 1 is its scale: how small it is for one protein says nothing of them.
                hold_to_bar(ours.ptm[0], theirs.ptm, float64.ptm, name, scale=1)
            continue
        trio = (
            np.concatenate([real(name, output[name], row, length).ravel() for row, length in enumerate(lengths)])
            for output in (ours, theirs, float64)
        )
        hold_to_bar(*trio, label=name)


@pytest.mark.parametrize(
    ("length", "num_recycles"), [(1, 0), (1, 3), (2, 1), (7, 2), (33, 0), (33, 1), (33, 2), (33, 3), (65, None)]
)
def test_outputs(models: Peers, length: int, num_recycles: int | None) -> None:
    hold_outputs(models, [length], num_recycles)


@pytest.mark.parametrize("chunk_size", [None, 1, 5])
def test_padded_batch(models: Peers, chunk_size: int | None) -> None:
    models.ours.set_chunk_size(chunk_size)
    hold_outputs(models, [17, 33, 1], 1)
    models.ours.trunk.set_chunk_size(None)


def test_chunks_change_nothing(models: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask, positions = residues([19, 12])
    whole = models.ours(ids, mask, positions, num_recycles=1)
    monkeypatch.setattr(pairs, "ELEMENTS_AT_A_TIME", 1)
    for chunk_size in (None, 4):
        models.ours.set_chunk_size(chunk_size)
        chunked = models.ours(ids, mask, positions, num_recycles=1)
        for name in ("positions", "s_z"):
            assert np.abs(real(name, chunked[name], 0, 19) - real(name, whole[name], 0, 19)).max() < 1e-3
    models.ours.set_chunk_size(None)
    with pytest.raises(ValueError, match="chunk_size=0: it must be 1 at least"):
        models.ours.set_chunk_size(0)


def test_recycles(models: Peers) -> None:
    """None is as many passes as the config says; each pass changes the structure, and the last one alone has a
    gradient."""
    ids = residues([12])[0]
    default, three, two = (models.ours(ids, num_recycles=n).positions for n in (None, 2, 1))
    assert mx.array_equal(default, three) and mx.abs(three - two).max() > 0.5
    with pytest.raises(ValueError, match="num_recycles=-1"):
        models.ours(ids, num_recycles=-1)


# Each part alone, with its gradient


def pair(x: np.ndarray) -> np.ndarray:
    """Of a mask [B, L], that of the pairs."""
    return x[:, :, None] * x[:, None]


Call = Callable[..., Any]
POSITIONS = np.array([[0, 1, 2, 3, 12, 13, 14, 15, 30], [5, 6, 7, 8, 9, 11, 0, 0, 0]])
# Where it is, the inputs (s, z, or both), how ours and theirs are called with them and a mask, the output's kind.
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
    """Its output for residues that are no padding, and the gradients of its inputs and weights."""
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


class Given(torch.nn.Module):
    """In the place of the trunk: what it returns."""

    def __init__(self, structure: dict[str, torch.Tensor]):
        super().__init__()
        self.structure = structure

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return self.structure


SAID = ["distogram_logits", "lm_logits", "lddt_head", "plddt", "ptm_logits", "ptm", "predicted_aligned_error"]
SAID_BY = ("distogram_head", "lm_head", "lddt_head", "ptm_head")


def test_heads(models: Peers) -> None:
    """What is said of given states, and the gradients of the states and of the heads' weights."""
    random, L = np.random.default_rng(6), 9
    shapes = {"s_s": (1, L, 64), "s_z": (1, L, L, 32), "states": (3, 1, L, 48)}
    given = {name: 2 * random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    ids = residues([L])[0]
    weights: dict[str, np.ndarray] = {}

    def torch_results(model: Any) -> list[np.ndarray]:
        model = copy.deepcopy(model)
        model.zero_grad()
        states = {
            name: torch.tensor(x, dtype=model.esm_s_combine.dtype, requires_grad=True) for name, x in given.items()
        }
        model.trunk = Given(states)
        output = model(torch.tensor(ids))
        for name in SAID:
            weights.setdefault(name, random.normal(size=output[name].shape).astype(np.float32))
        sum((output[name] * torch.tensor(weights[name])).sum() for name in SAID).backward()
        trained = [p.grad for name, p in sorted(model.named_parameters()) if name.startswith(SAID_BY)]
        gradients = [*(states[name].grad for name in given), *trained]
        return [*(output[name].detach().numpy() for name in SAID), *(g.numpy() for g in gradients)]

    theirs, float64 = torch_results(models.theirs), torch_results(models.float64)
    parameters = {name: models.ours.parameters()[name] for name in SAID_BY}

    def loss(parameters: Any, states: dict[str, mx.array]) -> tuple[mx.array, dict[str, mx.array]]:
        models.ours.update(parameters)
        output = models.ours.heads(states, mx.ones((1, L), dtype=mx.int32))
        output["ptm"] = output["ptm"][0]
        return sum((output[name] * mx.array(weights[name])).sum() for name in SAID), output

    states = {name: mx.array(x) for name, x in given.items()}
    (_, output), found = mx.value_and_grad(loss, argnums=(0, 1))(parameters, states)
    models.ours.update(parameters)
    gradients = [*(found[1][name] for name in given), *(g for _, g in sorted(tree_flatten(found[0])))]
    ours = [np.array(x) for x in (*(output[name] for name in SAID), *gradients)]
    assert len(ours) == len(theirs) == len(SAID) + 3 + 14
    scale = max(np.abs(x).max() for x in float64[len(SAID) :])
    for number, trio in enumerate(zip(ours, theirs, float64, strict=True)):
        hold_to_bar(*trio, label=str(number), scale=1 if number < len(SAID) else scale)


RECYCLED = ("recycle_s_norm", "recycle_z_norm", "recycle_disto")  # what each of the states is given to


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_one_pass(models: Peers, before: int) -> None:
    """A pass from the states and bins that the original's passes before it came to: no error is carried along."""
    ids, mask, positions = residues([33])
    s = np.random.default_rng(7).normal(size=(1, 33, 64)).astype(np.float32)
    states = [np.zeros_like(s), np.zeros((1, 33, 33, 32), dtype=np.float32), np.zeros((1, 33, 33), dtype=np.int64)]
    inputs = [torch.tensor(x) for x in (ids, positions, mask)]

    @torch.no_grad()
    def torch_pass(model: Any, states: list[np.ndarray], num_recycles: int = 0) -> Any:
        """The trunk as it stands, with states in the place of the zeros that it begins with, if any are given."""
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
        # Dividing by a small length makes a large error of a small one, for which nobody is to blame.
        factor = np.minimum(length, 1) if name == "angles" else 1
        hold_to_bar(*(np.asarray(output[name]) * factor for output in (ours, theirs, float64)), label=name)


def test_recycle_bins() -> None:
    """Those of the original, for distances that no rounding moves over a boundary."""
    random = np.random.default_rng(8)
    backbone = random.normal(size=(2, 60, 1, 3)) * 6 + random.normal(size=(2, 60, 3, 3))
    theirs = EsmFoldingTrunk.distogram(torch.tensor(backbone), 3.375, 21.375, 15)
    beside = EsmFoldingTrunk.distogram(torch.tensor(backbone * (1 + 1e-5)), 3.375, 21.375, 15)
    clear = (theirs == beside).numpy()
    ours = np.array(modeling_esmfold.recycle_bins(mx.array(backbone.astype(np.float32))))
    assert clear.mean() > 0.99 and (ours == theirs.numpy())[clear].all()
    assert set(np.unique(ours)) == set(range(15))


def test_whole_gradient(models: Peers) -> None:
    """Of everything that is trained, through the last pass."""
    ids, mask, positions = residues([11])
    random = np.random.default_rng(2)
    weight = random.normal(size=(1, 11, 11, 32)).astype(np.float32)
    atoms = random.normal(size=(3, 1, 11, 14, 3)).astype(np.float32)

    def theirs(model: Any) -> dict[str, np.ndarray]:
        model.zero_grad()
        output = model(*(torch.tensor(x) for x in (ids, mask, positions)), num_recycles=1)
        ((output.s_z * torch.tensor(weight)).sum() + (output.positions * torch.tensor(atoms)).sum()).backward()
        return {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}

    def loss(parameters: Any) -> mx.array:
        models.ours.update(parameters)
        output = models.ours(ids, mask, positions, num_recycles=1)
        return (output.s_z * mx.array(weight)).sum() + (output.positions * mx.array(atoms)).sum()

    trained = models.ours.trainable_parameters()
    ours = dict(tree_flatten(mx.grad(loss)(trained)))
    models.ours.update(trained)
    assert not [name for name in ours if name.startswith("esm.")]
    float32, float64 = theirs(models.theirs), theirs(models.float64)
    for name, exact in float64.items():
        if name == "embedding.weight":  # torch takes the row of alanine for padding, and never trains it
            ours[name], float32[name], exact = ours[name][1:], float32[name][1:], exact[1:]
        hold_to_bar(np.array(ours[name]), float32[name], exact, name, scale=np.abs(exact).max() + 1)


# Batches, chains and masked residues


def test_confidence_of_a_batch_is_that_of_each_protein(models: Peers) -> None:
    sequences = ["MKTAYIAKQR", "ACDEFGHIKLMNPQRSTVWYXACDE", "W"]
    batch = models.ours.infer(sequences, num_recycles=1)
    for row, sequence in enumerate(sequences):
        alone = models.ours.infer(sequence, num_recycles=1)
        assert np.allclose(batch.ptm[row], alone.ptm[0], atol=1e-5)
        assert np.allclose(batch.mean_plddt[row], alone.mean_plddt[0], atol=1e-5)
        exists = np.array(alone.atom37_atom_exists[0])
        assert np.allclose(alone.mean_plddt[0], np.array(alone.plddt[0])[exists > 0].mean(), atol=1e-5)
    assert not np.allclose(batch.ptm[0], batch.ptm[1], atol=1e-3)


def test_chains(models: Peers) -> None:
    """fair-esm's rules: linkers between chains, positions that jump, a linker is of the chain before it."""
    output = models.ours.infer(["MK:GXA", "W"], num_recycles=0, residue_index_offset=100, chain_linker="GGG")
    letters = RESTYPES + "X"
    assert "".join(letters[i] for i in np.array(output.aatype)[0]) == "MKGGGGXA"
    assert np.array(output.residue_index)[0].tolist() == [0, 1, 2, 3, 4, 105, 106, 107]
    assert np.array(output.chain_index).tolist() == [[0, 0, 0, 0, 0, 1, 1, 1], [0, *[-1] * 7]]
    atoms = np.array(output.atom37_atom_exists).sum(axis=-1)
    assert atoms.tolist() == [[8, 9, 0, 0, 0, 4, 0, 5], [14, *[0] * 7]]
    far = models.ours.infer("MK:GXA", num_recycles=0, residue_index_offset=1000, chain_linker="GGG")
    assert np.allclose(far.positions[:, 0], output.positions[:, 0, :8], atol=1e-3)  # far is far
    near = models.ours.infer("MK:GXA", num_recycles=0, residue_index_offset=None, chain_linker="GGG")
    assert not np.allclose(near.positions[:, 0], output.positions[:, 0, :8], atol=0.1)
    assert np.array(models.ours.infer("MK:A", num_recycles=0, chain_linker=None).aatype).shape == (1, 3)
    moved = models.ours.infer("MKA", residx=mx.arange(40, 43)[None], num_recycles=0)
    assert np.array(moved.residue_index).tolist() == [[40, 41, 42]]


def test_masking_pattern(models: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers', once its stem alone sees the mask and nothing is kept for a loss."""
    ids, mask, positions = residues([20])
    pattern = np.zeros_like(ids)
    pattern[:, 3:9] = 1

    def masked(self: Any, aa: Any, esmaa: Any, mask: Any, pattern: Any) -> tuple[Any, Any, None]:
        return aa, torch.where(pattern == 1, self.esm_dict_mask_idx, esmaa), None

    monkeypatch.setattr(EsmForProteinFolding, "bert_mask", masked)
    ours = models.ours(ids, mask, positions, masking_pattern=pattern, num_recycles=0)
    inputs = [torch.tensor(x) for x in (ids, mask, positions, pattern)]
    with torch.no_grad():
        theirs, float64 = (m(*inputs, num_recycles=0) for m in (models.theirs, models.float64))
    for name in ("s_s", "positions", "plddt"):
        hold_to_bar(ours[name], theirs[name], float64[name], name)
    assert mx.abs(ours.s_s - models.ours(ids, mask, positions, num_recycles=0).s_s).max() > 0.1
    with pytest.raises(ValueError, match="masking_pattern has the shape"):
        models.ours(ids, masking_pattern=pattern[:, :3])


def test_without_the_stem(models: Peers) -> None:
    """`esm_ablate_sequence` in transformers: zeros in place of the stem's states."""
    ids = residues([8])[0]
    stems = [model.config.esmfold_config for model in models[:3]]
    for config in stems:
        config.esm_ablate_sequence = True
    with torch.no_grad():
        theirs, float64 = (m(torch.tensor(ids), num_recycles=0) for m in (models.theirs, models.float64))
    hold_to_bar(models.ours(ids, num_recycles=0).s_s, theirs.s_s, float64.s_s)
    for config in stems:
        config.esm_ablate_sequence = False


def test_pdb(models: Peers) -> None:
    output = models.ours.infer(["MK:GX", "W"], num_recycles=0)
    first, second = models.ours.output_to_pdb(output)
    atoms = [line for line in first.splitlines() if line.startswith("ATOM")]
    assert [line[21:26] for line in atoms] == ["A   1"] * 8 + ["A   2"] * 9 + ["B   1"] * 4
    assert [line[12:16] for line in atoms[-4:]] == [" N  ", " CA ", " C  ", " O  "]
    where = np.array([[float(line[i : i + 8]) for i in (30, 38, 46)] for line in atoms])
    assert np.abs(where[0] - np.array(output.positions)[-1, 0, 0, 0]).max() < 1e-3
    confidence = [float(line[60:66]) for line in atoms]
    assert np.allclose(np.mean(confidence), 100 * np.array(output.mean_plddt)[0], atol=0.01)
    alone = models.ours.infer_pdb("W", num_recycles=0)
    assert alone == models.ours.infer_pdbs(["W"], num_recycles=0)[0]
    assert [line[:30] for line in alone.splitlines()] == [line[:30] for line in second.splitlines()]
    with pytest.raises(ValueError, match="infer_pdb folds one sequence"):
        models.ours.infer_pdb(["W"])


PROTEINS = st.lists(st.text(RESTYPES + "X", min_size=1, max_size=9), min_size=1, max_size=3)


@settings(max_examples=12, deadline=None)
@given(PROTEINS, st.integers(0, 2))
def test_backbones_in_files_are_ideal(models: Peers, chains: list[str], num_recycles: int) -> None:
    """Bond lengths and angles of each residue in a file are those of the table, as far as its three digits tell."""
    pdb = models.ours.infer_pdb(":".join(chains), num_recycles=num_recycles)
    found = list(PDBParser(QUIET=True).get_structure("protein", io.StringIO(pdb)).get_residues())
    assert seq1("".join(residue.resname for residue in found)) == "".join(chains).replace("X", "")
    for residue in found:
        table = {name: np.array(place) for name, (_, place) in RESIDUES[seq1(residue.resname)].atoms.items()}
        table["O"] = table["C"] + (table["O"][0], np.hypot(*table["O"][1:]), 0)  # however it is turned around CA-C
        atoms = {name: residue[name].coord for name in ("N", "CA", "C", "O")}
        for a, b in (("N", "CA"), ("CA", "C"), ("C", "O")):
            assert abs(np.linalg.norm(atoms[a] - atoms[b]) - np.linalg.norm(table[a] - table[b])) < 2e-3
        for a, b, c in (("N", "CA", "C"), ("CA", "C", "O")):
            assert abs(angle(atoms[a], atoms[b], atoms[c]) - angle(table[a], table[b], table[c])) < 0.2


def angle(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
    """At b, in degrees."""
    a, c = a - b, c - b
    return float(np.degrees(np.arccos(a @ c / np.linalg.norm(a) / np.linalg.norm(c))))


# Refusals


@pytest.mark.parametrize("sequence", ["", "MK:", "mkt", "MK-T", "MK T", "MKÄ"])
def test_no_protein(models: Peers, sequence: str) -> None:
    with pytest.raises(ValueError, match="cannot be folded: a protein is written in capital letters"):
        models.ours.infer(sequence)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [[0, 21]]}, "input_ids has 21: folding takes residues, 0 to 20"),
        ({"input_ids": [[-1, 2]]}, "input_ids has -1"),
        ({"input_ids": [0, 1]}, r"whole numbers \[B, L\]"),
        ({"input_ids": [[0.0]]}, r"whole numbers \[B, L\]"),
        ({"input_ids": [[0, 1]], "attention_mask": [[0, 1]]}, "Pad on the right"),
        ({"input_ids": [[0, 1, 2]], "attention_mask": [[1, 0, 1]]}, "Pad on the right"),
        ({"input_ids": [[0, 1]], "attention_mask": [[0, 0]]}, "must begin at the first place"),
        ({"input_ids": [[0, 1]], "attention_mask": [[1, 2]]}, "1 for residues and 0 for padding"),
        ({"input_ids": [[0, 1]], "attention_mask": [[1]]}, "attention_mask has the shape"),
        ({"input_ids": [[0, 1]], "position_ids": [[0, 1, 2]]}, "position_ids has the shape"),
        ({"input_ids": [[0, 1]], "position_ids": [[0.0, 1.0]]}, "position_ids must be whole numbers"),
    ],
)
def test_refused_inputs(models: Peers, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.ours(**arguments)


def test_refused_configs() -> None:
    fields = tiny_folding()
    with pytest.raises(ValueError, match="MLXEsmForProteinFolding folds"):
        MLXEsmForMaskedLM(MLXEsmConfig(**fields))
    with pytest.raises(ValueError, match="a language model, which does not fold"):
        MLXEsmForProteinFolding(MLXEsmConfig(**fields | {"is_folding_model": False}))
    with pytest.raises(ValueError, match="vocab_list lacks <mask>"):
        MLXEsmForProteinFolding(MLXEsmConfig(**fields | {"vocab_list": fields["vocab_list"][:-1]}))
    fields["esmfold_config"]["trunk"]["structure_module"]["num_angles"] = 5
    with pytest.raises(ValueError, match="num_angles = 5"):
        MLXEsmForProteinFolding(MLXEsmConfig(**fields))


# Files and dtypes


@pytest.mark.parametrize("stem", ["float32", "float16"])
def test_round_trip(request: pytest.FixtureRequest, stem: str, tmp_path: Any) -> None:
    """transformers loads what is written here, and has the same bits in the same dtypes."""
    models = request.getfixturevalue("models" if stem == "float32" else "half_stem")
    models.ours.save_pretrained(tmp_path)
    back, info = EsmForProteinFolding.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    wanted, found = models.theirs.state_dict(), back.state_dict()
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    stored = load_file(tmp_path / "model.safetensors")
    assert {str(x.dtype) for name, x in stored.items() if name.startswith("esm.")} == {f"torch.{stem}"}
    assert stored["af2_to_esm"].dtype == torch.int64
    frequencies = {name for name in stored if name.endswith("inv_freq")}  # in each layer, as in transformers 4
    assert frequencies == {f"esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq" for i in range(3)}


def test_layout_of_transformers_4(half_stem: Peers, tmp_path: Any) -> None:
    """Inverse frequencies in each layer, position ids, and no contact head."""
    state = {}
    for name, value in half_stem.theirs.state_dict().items():
        if name == "esm.rotary_embeddings.inv_freq":
            for layer in range(3):
                state[f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"] = value.clone()
        elif "contact_head" not in name:
            state[name] = value
    state["esm.embeddings.position_ids"] = torch.arange(1026)[None]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    half_stem.theirs.config.save_pretrained(tmp_path)
    model, info = MLXEsmForProteinFolding.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.rpartition(".")[0] for name in info["missing_keys"]} == {"esm.contact_head.regression"}
    assert not info["unexpected_keys"]
    ids = residues([9])[0]
    assert mx.array_equal(model(ids).positions, half_stem.ours(ids).positions)


TRANSFORMERS_4 = """
import sys, transformers
assert transformers.__version__.startswith("4.")
theirs, back = sys.argv[1:]
model, info = transformers.EsmForProteinFolding.from_pretrained(theirs, output_loading_info=True)
assert not any(info.values()), info
model.save_pretrained(back)
"""


@pytest.mark.long
@pytest.mark.parametrize("stem", ["float32", "float16"])
def test_there_and_back_through_transformers_4(request: pytest.FixtureRequest, stem: str, tmp_path: Any) -> None:
    """The last 4.x loads what is written here, and from what it writes the same bits are loaded here."""
    ours = request.getfixturevalue("models" if stem == "float32" else "half_stem").ours
    ours.save_pretrained(tmp_path / "ours")
    python = python_of_transformers_4(tmp_path)
    subprocess.run([python, "-c", TRANSFORMERS_4, tmp_path / "ours", tmp_path / "theirs"], check=True)
    back, info = MLXEsmForProteinFolding.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(info.values())
    wanted, found = ours.state_dict(), back.state_dict()
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and mx.array_equal(found[name], value), name


def test_part_of_a_checkpoint(models: Peers, tmp_path: Any) -> None:
    state = {name: x for name, x in models.theirs.state_dict().items() if ".tri_mul_in." not in name}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    models.theirs.config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="cannot do without, 'trunk.blocks.0.tri_mul_in"):
        MLXEsmForProteinFolding.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [None, "auto", "float32", "bfloat16"])
def test_dtypes(half_stem: Peers, dtype: str | None) -> None:
    """The stem is float16 whatever the trunk is; frames and atoms are float32."""
    model = MLXEsmForProteinFolding.from_pretrained(half_stem.folder, dtype=dtype)
    trunk = mx.bfloat16 if dtype == "bfloat16" else mx.float32
    assert model.dtype == trunk
    for name, array in model.named_parameters():
        assert array.dtype == (mx.float16 if name.startswith("esm.") else trunk), name
    output = model(residues([9])[0], num_recycles=0)
    assert output.positions.dtype == output.frames.dtype == mx.float32
    assert mx.isfinite(output.positions).all() and output.s_z.dtype == trunk


def test_float16_trunk_is_refused(half_stem: Peers) -> None:
    with pytest.raises(ValueError, match="The folding trunk cannot be float16: the sums"):
        MLXEsmForProteinFolding.from_pretrained(half_stem.folder, dtype="float16")
    with pytest.raises(ValueError, match="The folding trunk cannot be float16"):
        half_stem.ours.half()


@needs_cpu
def test_half_stem_computes_in_float32_on_a_cpu(half_stem: Peers) -> None:
    """As the same weights, cast: half precision would show in the third digit."""
    widened = copy.deepcopy(half_stem.theirs).float()
    exact = copy.deepcopy(half_stem.theirs).double()
    ids = residues([21])[0]
    with torch.no_grad():
        theirs, float64 = (m(torch.tensor(ids), num_recycles=0) for m in (widened, exact))
    output = half_stem.ours(ids, num_recycles=0)
    for name in ("s_s", "s_z", "positions"):
        hold_to_bar(output[name], theirs[name], float64[name], name)
    assert half_stem.ours.esm.embeddings.word_embeddings.weight.dtype == mx.float16


def test_stem_is_never_there_twice() -> None:
    """On a CPU one of its twelve layers at a time is in float32."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 12, "intermediate_size": 1024}
    model = MLXEsmForProteinFolding(MLXEsmConfig(**tiny_folding(fp16_esm=True) | sizes)).eval()
    mx.eval(model.parameters())
    stem = sum(x.nbytes for _, x in tree_flatten(model.esm.parameters()))
    ids = mx.array(residues([10])[0].astype(np.int32))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model.compute_language_model_representations(ids, mx.ones_like(ids)))
    assert mx.get_peak_memory() - before < 2 * stem * 3 / 12  # float32 of two layers, and half of one for states


def test_lazy(half_stem: Peers) -> None:
    """Weights that stay in the file until they are needed give the same structure."""
    ids = residues([9])[0]
    lazy = MLXEsmForProteinFolding.from_pretrained(half_stem.folder, lazy=True)
    assert mx.array_equal(lazy(ids).positions, half_stem.ours(ids).positions)


def test_published_size() -> None:
    """Of `facebook/esmfold_v1`: its parameters, its keys, and a stem of half the bytes. Nothing is computed."""
    sizes = {
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 40,
        "intermediate_size": 10240,
        "esmfold_config": {},
    }
    model = MLXEsmForProteinFolding(MLXEsmConfig(**tiny_folding() | sizes))
    state = model.state_dict()
    assert model.num_parameters() == 3_525_038_915 and len(state) == 4500
    assert {x.dtype for name, x in state.items() if name.startswith("esm.")} == {mx.float16}
