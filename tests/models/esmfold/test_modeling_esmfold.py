"""ESMFold compared with transformers: every output, every part with its gradient, and deliberate differences."""

from __future__ import annotations

import copy
import io
import subprocess
from collections.abc import Iterator
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

from mlx_esm_hf import MLXEsmConfig, MLXEsmForMaskedLM, MLXEsmForProteinFolding
from mlx_esm_hf.errors import CheckpointError
from mlx_esm_hf.models.esmfold.residue_constants import RESIDUES, RESTYPES
from tests.bar import hold_to_bar
from tests.checkpoints import python_of_transformers_4
from tests.marks import needs_cpu
from tests.models.esmfold.folding import Peers, peers, real, residues
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


def hold_outputs(models: Peers, lengths: list[int], num_recycles: int | None, **more: Any) -> None:
    """Compare each field at real residues; pTM is compared for a single protein only."""
    ids, mask, positions = residues(lengths)
    ours = models.ours(ids, mask, positions, num_recycles=num_recycles)
    inputs = [torch.tensor(x) for x in (ids, mask, positions)]
    with torch.no_grad():
        theirs, float64 = (m(*inputs, num_recycles=num_recycles) for m in (models.theirs, models.float64))
    assert set(theirs.keys()) | {"mean_plddt"} == set(ours.keys())
    norms = np.linalg.norm(float64.unnormalized_angles, axis=-1, keepdims=True)
    for name in theirs:
        assert ours[name].shape == ((len(lengths),) if name == "ptm" else theirs[name].shape), name
        if name == "ptm":
            if len(lengths) == 1:
                # A mean of probabilities, so its scale is 1, however small it is for this protein.
                hold_to_bar(ours.ptm[0], theirs.ptm, float64.ptm, name, scale=1)
            continue
        # Dividing by a small norm amplifies a small error.
        factor = np.minimum(norms, 1) if name == "angles" else 1
        trio = (
            np.concatenate(
                [real(name, np.asarray(output[name]) * factor, row, n).ravel() for row, n in enumerate(lengths)]
            )
            for output in (ours, theirs, float64)
        )
        hold_to_bar(*trio, label=name)


@pytest.mark.parametrize(
    ("length", "num_recycles"), [(1, 0), (1, 3), (2, 1), (7, 2), (33, 0), (33, 1), (33, 2), (33, 3), (65, None)]
)
def test_outputs(models: Peers, length: int, num_recycles: int | None) -> None:
    hold_outputs(models, [length], num_recycles)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("chunk_size", [None, 1, 5])
def test_padded_batch(models: Peers, chunk_size: int | None) -> None:
    models.ours.set_chunk_size(chunk_size)
    hold_outputs(models, [17, 33, 1], 1)
    models.ours.trunk.set_chunk_size(None)


# Heads and gradients


class Given(torch.nn.Module):
    """Stands in for the trunk and returns given states."""

    def __init__(self, structure: dict[str, torch.Tensor]):
        super().__init__()
        self.structure = structure

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return self.structure


HEAD_OUTPUTS = ["distogram_logits", "lm_logits", "lddt_head", "plddt", "ptm_logits", "ptm", "predicted_aligned_error"]
HEADS = ("distogram_head", "lm_head", "lddt_head", "ptm_head")


def test_heads(models: Peers) -> None:
    """Compare the outputs for given states, and the gradients of the states and the heads' weights."""
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
        for name in HEAD_OUTPUTS:
            weights.setdefault(name, random.normal(size=output[name].shape).astype(np.float32))
        sum((output[name] * torch.tensor(weights[name])).sum() for name in HEAD_OUTPUTS).backward()
        trained = [p.grad for name, p in sorted(model.named_parameters()) if name.startswith(HEADS)]
        gradients = [*(states[name].grad for name in given), *trained]
        return [*(output[name].detach().numpy() for name in HEAD_OUTPUTS), *(g.numpy() for g in gradients)]

    theirs, float64 = torch_results(models.theirs), torch_results(models.float64)
    parameters = {name: models.ours.parameters()[name] for name in HEADS}

    def loss(parameters: Any, states: dict[str, mx.array]) -> tuple[mx.array, dict[str, mx.array]]:
        models.ours.update(parameters)
        output = models.ours.heads(states, mx.ones((1, L), dtype=mx.int32))
        output["ptm"] = output["ptm"][0]
        return sum((output[name] * mx.array(weights[name])).sum() for name in HEAD_OUTPUTS), output

    states = {name: mx.array(x) for name, x in given.items()}
    (_, output), found = mx.value_and_grad(loss, argnums=(0, 1))(parameters, states)
    models.ours.update(parameters)
    gradients = [*(found[1][name] for name in given), *(g for _, g in sorted(tree_flatten(found[0])))]
    ours = [np.array(x) for x in (*(output[name] for name in HEAD_OUTPUTS), *gradients)]
    assert len(ours) == len(theirs) == len(HEAD_OUTPUTS) + 3 + 14
    scale = max(np.abs(x).max() for x in float64[len(HEAD_OUTPUTS) :])
    for number, trio in enumerate(zip(ours, theirs, float64, strict=True)):
        hold_to_bar(*trio, label=str(number), scale=1 if number < len(HEAD_OUTPUTS) else scale)


def test_whole_gradient(models: Peers) -> None:
    """Compare the gradients of all trained parameters, through the last pass."""
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
    small: list[list[np.ndarray]] = [[], [], []]
    for name, exact in float64.items():
        trio = [np.array(ours[name]), float32[name], exact]
        if name == "embedding.weight":  # torch uses alanine's row as padding and does not train it
            trio = [gradient[1:] for gradient in trio]
        scale = np.abs(trio[2]).max() + 1
        if exact.size >= 64:
            hold_to_bar(*trio, label=name, scale=scale)
            continue
        for group, gradient in zip(small, trio, strict=True):
            group.append(gradient.ravel() / scale)
    # The largest error of a few elements is luck, in torch as here, so small parameters are compared together.
    hold_to_bar(*map(np.concatenate, small), label="small parameters", scale=1)


# Batches, chains and masked residues


def test_confidence_of_a_protein_does_not_depend_on_its_batch(models: Peers) -> None:
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
    """As in fair-esm, linkers join chains, positions jump, and a linker belongs to the chain before it."""
    output = models.ours.infer(["MK:GXA", "W"], num_recycles=0, residue_index_offset=100, chain_linker="GGG")
    letters = RESTYPES + "X"
    assert "".join(letters[i] for i in np.array(output.aatype)[0]) == "MKGGGGXA"
    assert np.array(output.residue_index)[0].tolist() == [0, 1, 2, 3, 4, 105, 106, 107]
    assert np.array(output.chain_index).tolist() == [[0, 0, 0, 0, 0, 1, 1, 1], [0, *[-1] * 7]]
    atoms = np.array(output.atom37_atom_exists).sum(axis=-1)
    assert atoms.tolist() == [[8, 9, 0, 0, 0, 4, 0, 5], [14, *[0] * 7]]
    far = models.ours.infer("MK:GXA", num_recycles=0, residue_index_offset=1000, chain_linker="GGG")
    assert np.allclose(
        far.positions[:, 0], output.positions[:, 0, :8], atol=1e-3
    )  # beyond the largest bin, the distance has no effect
    near = models.ours.infer("MK:GXA", num_recycles=0, residue_index_offset=None, chain_linker="GGG")
    assert not np.allclose(near.positions[:, 0], output.positions[:, 0, :8], atol=0.1)
    assert np.array(models.ours.infer("MK:A", num_recycles=0, chain_linker=None).aatype).shape == (1, 3)
    moved = models.ours.infer("MKA", residx=mx.arange(40, 43)[None], num_recycles=0)
    assert np.array(moved.residue_index).tolist() == [[40, 41, 42]]


def test_masking_pattern(models: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with transformers after fixing it to mask the stem's input only, without labels for a loss."""
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
    with pytest.raises(ValueError, match="masking_pattern must have the shape of input_ids"):
        models.ours(ids, masking_pattern=pattern[:, :3])


def test_without_the_stem(models: Peers) -> None:
    """With `esm_ablate_sequence`, the stem's states are zeros, as in transformers."""
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
    with pytest.raises(ValueError, match="infer_pdb expects one sequence"):
        models.ours.infer_pdb(["W"])


PROTEINS = st.lists(st.text(RESTYPES + "X", min_size=1, max_size=9), min_size=1, max_size=3)


@settings(max_examples=12, deadline=None)
@given(PROTEINS, st.integers(0, 2))
def test_backbones_in_files_are_ideal(models: Peers, chains: list[str], num_recycles: int) -> None:
    """Bond lengths and angles in PDB files match the table, up to the precision of three decimals."""
    pdb = models.ours.infer_pdb(":".join(chains), num_recycles=num_recycles)
    found = list(PDBParser(QUIET=True).get_structure("protein", io.StringIO(pdb)).get_residues())
    assert seq1("".join(residue.resname for residue in found)) == "".join(chains).replace("X", "")
    for residue in found:
        table = {name: np.array(place) for name, (_, place) in RESIDUES[seq1(residue.resname)].atoms.items()}
        table["O"] = table["C"] + (
            table["O"][0],
            np.hypot(*table["O"][1:]),
            0,
        )  # independent of its rotation around CA-C
        atoms = {name: residue[name].coord for name in ("N", "CA", "C", "O")}
        for a, b in (("N", "CA"), ("CA", "C"), ("C", "O")):
            assert abs(np.linalg.norm(atoms[a] - atoms[b]) - np.linalg.norm(table[a] - table[b])) < 2e-3
        for a, b, c in (("N", "CA", "C"), ("CA", "C", "O")):
            assert abs(angle(atoms[a], atoms[b], atoms[c]) - angle(table[a], table[b], table[c])) < 0.2


def angle(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
    """Return the angle at b in degrees."""
    a, c = a - b, c - b
    return float(np.degrees(np.arccos(a @ c / np.linalg.norm(a) / np.linalg.norm(c))))


# Errors


@pytest.mark.parametrize("sequence", ["", "MK:", "mkt", "MK-T", "MK T", "MKÄ"])
def test_invalid_sequences(models: Peers, sequence: str) -> None:
    with pytest.raises(ValueError, match="cannot be folded: a protein must be capital letters"):
        models.ours.infer(sequence)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [[0, 21]]}, "input_ids must be residues, 0 to 20 .* got 21"),
        ({"input_ids": [[-1, 2]]}, "input_ids must be residues, 0 to 20 .* got -1"),
        ({"input_ids": [0, 1]}, r"input_ids must be integers \[batch, length\]"),
        ({"input_ids": [[0.0]]}, r"input_ids must be integers \[batch, length\]"),
        ({"input_ids": [[0, 1]], "attention_mask": [[0, 1]]}, "padding on the right only"),
        ({"input_ids": [[0, 1, 2]], "attention_mask": [[1, 0, 1]]}, "padding on the right only"),
        ({"input_ids": [[0, 1]], "attention_mask": [[0, 0]]}, "must start with 1"),
        ({"input_ids": [[0, 1]], "attention_mask": [[1, 2]]}, "1 for residues and 0 for padding"),
        ({"input_ids": [[0, 1]], "attention_mask": [[1]]}, "attention_mask must have the shape of input_ids"),
        ({"input_ids": [[0, 1]], "position_ids": [[0, 1, 2]]}, "position_ids must have the shape of input_ids"),
        ({"input_ids": [[0, 1]], "position_ids": [[0.0, 1.0]]}, "position_ids must be integers"),
    ],
)
def test_refused_inputs(models: Peers, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.ours(**arguments)


def test_refused_configs() -> None:
    fields = tiny_folding()
    with pytest.raises(ValueError, match="is a folding model.*MLXEsmForProteinFolding"):
        MLXEsmForMaskedLM(MLXEsmConfig(**fields))
    with pytest.raises(ValueError, match="is a language model. Folding needs an ESMFold model"):
        MLXEsmForProteinFolding(MLXEsmConfig(**fields | {"is_folding_model": False}))
    with pytest.raises(ValueError, match="vocab_list lacks <mask>"):
        MLXEsmForProteinFolding(MLXEsmConfig(**fields | {"vocab_list": fields["vocab_list"][:-1]}))
    fields["esmfold_config"]["trunk"]["structure_module"]["num_angles"] = 5
    with pytest.raises(ValueError, match="num_angles must be 7, got 5"):
        MLXEsmForProteinFolding(MLXEsmConfig(**fields))


# Files and dtypes


@pytest.mark.parametrize("stem", ["float32", "float16"])
def test_round_trip(request: pytest.FixtureRequest, stem: str, tmp_path: Any) -> None:
    """Transformers loads the files that we save, with the same bits and dtypes."""
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


def test_files_of_transformers_4(half_stem: Peers, tmp_path: Any) -> None:
    """They have inverse frequencies in each layer, position ids, and no contact head."""
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
    """The last 4.x loads the files that we save, and we load the files that it saves, with identical bits."""
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
    with pytest.raises(CheckpointError, match="requires, such as 'trunk.blocks.0.tri_mul_in"):
        MLXEsmForProteinFolding.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [None, "auto", "float32", "bfloat16"])
def test_dtypes(half_stem: Peers, dtype: str | None) -> None:
    """The stem stays float16 for any dtype of the trunk; frames and atoms are float32."""
    model = MLXEsmForProteinFolding.from_pretrained(half_stem.folder, dtype=dtype)
    trunk = mx.bfloat16 if dtype == "bfloat16" else mx.float32
    assert model.dtype == trunk
    for name, array in model.named_parameters():
        assert array.dtype == (mx.float16 if name.startswith("esm.") else trunk), name
    output = model(residues([9])[0], num_recycles=0)
    assert output.positions.dtype == output.frames.dtype == mx.float32
    assert mx.isfinite(output.positions).all() and output.s_z.dtype == trunk


def test_float16_trunk_is_refused(half_stem: Peers) -> None:
    with pytest.raises(ValueError, match="The folding trunk cannot be float16: its triangle"):
        MLXEsmForProteinFolding.from_pretrained(half_stem.folder, dtype="float16")
    with pytest.raises(ValueError, match="The folding trunk cannot be float16"):
        half_stem.ours.half()


@needs_cpu
def test_half_stem_computes_in_float32_on_a_cpu(half_stem: Peers) -> None:
    """The result is that of the weights cast to float32; half precision would differ in the third digit."""
    widened = copy.deepcopy(half_stem.theirs).float()
    exact = copy.deepcopy(half_stem.theirs).double()
    ids = residues([21])[0]
    with torch.no_grad():
        theirs, float64 = (m(torch.tensor(ids), num_recycles=0) for m in (widened, exact))
    output = half_stem.ours(ids, num_recycles=0)
    for name in ("s_s", "s_z", "positions"):
        hold_to_bar(output[name], theirs[name], float64[name], name)
    assert half_stem.ours.esm.embeddings.word_embeddings.weight.dtype == mx.float16


def test_stem_is_cast_layer_by_layer() -> None:
    """On a CPU one of its twelve layers at a time is cast to float32."""
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
    """Weights that are read only when they are needed give the same structure."""
    ids = residues([9])[0]
    lazy = MLXEsmForProteinFolding.from_pretrained(half_stem.folder, lazy=True)
    assert mx.array_equal(lazy(ids).positions, half_stem.ours(ids).positions)


def test_published_size() -> None:
    """`facebook/esmfold_v1` has these numbers of parameters and keys, and a float16 stem. Nothing is computed."""
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
