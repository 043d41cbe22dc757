"""ESMFold2 as a whole compared with transformers, with the same random numbers in float32 and float64."""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from transformers import EsmFold2Model

from mlx_esm_hf import MLXAutoModel, MLXEsmFold2Model
from mlx_esm_hf.models.esmfold2.features import pad_features, protein_features
from mlx_esm_hf.models.esmfold2.modeling_esmfold2 import best_sample, lengths
from tests.bar import hold_to_bar
from tests.models.esmfold2.oracle import Peers, Replay, as_torch, batch, peers, record, replayed
from tests.parity import one_thread

COORDINATES = 1e-4 / 60  # of their scale: the alignment in each step amplifies the rounding of the denoiser


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module", params=[True, False], ids=["with MSA encoder", "Fast"])
def models(request, tmp_path_factory) -> Peers:
    return peers(tmp_path_factory.mktemp("fold2"), msa=request.param)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> MLXEsmFold2Model:
    return peers(tmp_path_factory.mktemp("one")).ours


# Features of each case: {name: (features, loops, samples, steps)}


def plain(*sequences: str) -> dict[str, np.ndarray]:
    return batch(dict.fromkeys(sequences, 1))


def reversed_chains() -> dict[str, np.ndarray]:
    features = plain("MKTAYIAKQRW:GSHMACDEF:GSHMACDEF")
    return features | {"asym_id": features["asym_id"].max() - features["asym_id"]}


def modified_residue() -> dict[str, np.ndarray]:
    """Residues 3 to 5 are the atoms of one modified residue."""
    features = plain("MKTAYIAKQRW")
    index = features["residue_index"].copy()
    index[0, 3:6] = 3
    index[0, 6:] -= 2
    return features | {"residue_index": index, "res_type": np.where(index == 3, 22, features["res_type"])}


def ligand() -> dict[str, np.ndarray]:
    """The last two residues are two bonded atoms of a ligand: one atom for each token, and no protein."""
    features = {name: x.copy() for name, x in plain("MKTAYIAKQGG").items()}
    tokens = np.array([9, 10])
    atoms = np.flatnonzero(features["atom_attention_mask"][0] & np.isin(features["atom_to_token"][0], tokens))
    keep = [atoms[0], atoms[4]]
    first, last = atoms[0], atoms[-1] + 1
    order = np.r_[0:first, keep, last : features["ref_pos"].shape[1], np.setdiff1d(atoms, keep)]
    for name in ("ref_pos", "ref_charge", "ref_element", "ref_atom_name_chars", "ref_space_uid", "atom_to_token"):
        features[name] = features[name][:, order]
    features["atom_attention_mask"][:] = np.arange(len(order)) < first + 2
    features["atom_to_token"][:, first + 2 :] = 0
    features["mol_type"][0, 9:] = 3
    features["asym_id"][0, 9:] = 1
    features["entity_id"][0, 9:] = 2
    features["ref_element"][0, first + 1] = 30
    features["distogram_atom_idx"][0, 9:] = [first, first + 1]
    features["token_bonds"][0, 9, 10] = features["token_bonds"][0, 10, 9] = 1
    return features


def masked_columns() -> dict[str, np.ndarray]:
    features = batch({"MKTAYIAKQRW": 4})
    mask = features["msa_attention_mask"].copy()
    mask[0, 1:, 3:5] = False
    mask[0, :, 8] = False
    return features | {"msa_attention_mask": mask}


CASES: dict[str, Any] = {
    "one chain": (lambda: plain("MKTAYIAKQRQISFVKSHFS"), 2, 3, 14),
    "two chains": (lambda: plain("MKTAYIAKQRW:GSHMACDEF"), 1, 2, 5),
    "equal chains, reversed": (reversed_chains, 1, 1, 5),
    "modified residue": (modified_residue, 0, 2, 5),
    "ligand with a bond": (ligand, 1, 2, 5),
    "unequal lengths": (lambda: plain("MKTAYIAKQRWFF:GSHM", "AC", "ACDEXGHIKLX"), 1, 2, 5),
    # Several proteins, because one has too few values to estimate torch's error.
    "shorter than the window": (lambda: plain("AC", "GA", "MK", "WY", "TV", "SN", "DE", "PH"), 3, 1, 5),
    "alignment of 4 rows": (masked_columns, 1, 1, 5),
    "alignment of 40 rows, unequal depth": (lambda: batch({"MKTAYIAK:GSHM": 40, "ACDEF": 7}), 1, 1, 5),
    "no language model": (lambda: {k: v for k, v in plain("MKTAYIAK").items() if k != "input_ids"}, 1, 1, 5),
    "one step": (lambda: plain("MKTAYIAK"), 0, 1, 1),
}
MASKED = {
    "sample_atom_coords": "A",
    "plddt_logits": "A",
    "plddt_per_atom": "A",
    "resolved_logits": "A",
    "plddt": "L",
    "plddt_ca": "L",
    "pae_logits": "LL",
    "pae": "LL",
    "pde_logits": "LL",
    "pde": "LL",
    "distogram_logits": "LL",
}


def of_proteins(name: str, values: np.ndarray, features: dict[str, np.ndarray]) -> np.ndarray:
    """Return a field's values without padding."""
    if name not in MASKED:
        return values
    mask = features["atom_attention_mask" if MASKED[name] == "A" else "attention_mask"].astype(bool)
    mask = mask[:, :, None] & mask[:, None] if MASKED[name] == "LL" else mask
    return values[np.repeat(mask, len(values) // len(mask), axis=0)]


@functools.cache
def case(name: str) -> tuple[dict[str, np.ndarray], int, int, int]:
    make, loops, samples, steps = CASES[name]
    return make(), loops, samples, steps


@pytest.mark.parametrize("name", CASES)
def test_fold(models: Peers, name: str) -> None:
    """Every output is within the bar, for every kind of input."""
    features, loops, samples, steps = case(name)
    shape = (*features["attention_mask"].shape, features["ref_pos"].shape[1])
    recorded = record(models.theirs.config, shape, samples, loops + 1, steps)
    options = {"num_diffusion_samples": samples, "num_sampling_steps": steps, "num_loops": loops}
    theirs = []
    for torch_model, dtype in ((models.theirs, torch.float32), (models.float64, torch.float64)):
        with replayed(recorded, dtype):
            theirs.append(torch_model.fold(**as_torch(features, dtype), **options))
    draws = Replay(recorded, samples, lengths(mx.array(features["atom_attention_mask"])))
    ours: Any = models.ours.fold(**features, **options, draws=draws)
    assert list(ours) == list(theirs[0])
    for field in ours:
        found, *expected = (of_proteins(field, np.array(x[field]), features) for x in (ours, *theirs))
        if field == "plddt_ca":
            continue  # below
        if field == "complex_iplddt" and len(features["attention_mask"]) > 1:
            found, expected = found[:samples], [x[:samples] for x in expected]  # transformers counts padding
        floor = COORDINATES if field == "sample_atom_coords" else 1e-6
        scale = 1.0 if field in ("ptm", "iptm", "pair_chains_iptm") else 0.0
        hold_to_bar(found, *expected, field, scale=scale, floor=floor)
    for field in ours:  # padding is 0
        if field in MASKED and field != "distogram_logits":
            values = np.array(ours[field])
            assert np.count_nonzero(values) == np.count_nonzero(of_proteins(field, values, features))


def test_recorded_numbers_are_those_of_a_seed(models: Peers) -> None:
    """The replayed run equals transformers' own run after the same seed, bit for bit."""
    features, loops, samples, steps = case("two chains")
    shape = (*features["attention_mask"].shape, features["ref_pos"].shape[1])
    options = {"num_diffusion_samples": samples, "num_sampling_steps": steps, "num_loops": loops}
    recorded = record(models.theirs.config, shape, samples, loops + 1, steps, seed=5)
    with replayed(recorded, torch.float32):
        replay = models.theirs.fold(**as_torch(features, torch.float32), **options)
    torch.manual_seed(5)
    own = models.theirs.fold(**as_torch(features, torch.float32), **options)
    assert torch.equal(own.sample_atom_coords, replay.sample_atom_coords)


def test_trunk(models: Peers) -> None:
    """Fields of the trunk's output, with hidden states that the caller computed."""
    features, _, _, _ = case("two chains")
    B, L = features["attention_mask"].shape
    recorded = record(models.theirs.config, (B, L, features["ref_pos"].shape[1]), 1, 2, 1)
    hidden = np.random.default_rng(0).standard_normal((B, L, 3, 36)).astype(np.float32)
    theirs = []
    for torch_model, dtype in ((models.theirs, torch.float32), (models.float64, torch.float64)):
        module = __import__(type(torch_model).__module__, fromlist=["EsmFold2AtomInputs"])
        given = as_torch(features, dtype)
        names = module.EsmFold2AtomInputs.__dataclass_fields__
        atoms = module.EsmFold2AtomInputs(**{name: given.pop(name) for name in names})
        given.pop("distogram_atom_idx")
        with replayed(recorded, dtype), torch.no_grad():
            states = torch.tensor(hidden, dtype=dtype)
            theirs.append(torch_model(atom_inputs=atoms, lm_hidden_states=states, num_loops=1, **given))
    ours: Any = models.ours(num_loops=1, lm_hidden_states=hidden, draws=Replay(recorded, 1, [0]), **features)
    for field in ours:
        hold_to_bar(np.array(ours[field]), *(x[field].numpy() for x in theirs), field)
    assert set(theirs[0]) - set(ours) == {"atom_inputs"}


# What ours does differently


def test_plddt_of_alpha_atoms(model: MLXEsmFold2Model) -> None:
    """`plddt_ca` is that of the Cα; transformers' is that of the Cβ."""
    features, _, _, _ = case("ligand with a bond")
    output = model.fold(**features, num_diffusion_samples=1, num_sampling_steps=1, num_loops=0)
    plddt = np.array(output.plddt_per_atom)[0]
    starts = [np.flatnonzero(features["atom_to_token"][0] == token)[0] for token in range(11)]
    starts[0] = 0
    expected = [plddt[start + (token < 9)] for token, start in enumerate(starts)]  # N, CA, ...; ligands have one atom
    np.testing.assert_array_equal(np.array(output.plddt_ca)[0], expected)


def test_padding_is_no_partner_of_an_interface(models: Peers) -> None:
    """`complex_iplddt` of a protein does not change with padding."""
    features = {name: np.array(x) for name, x in pad_features([protein_features("MKTA:GGWYV")]).items()}
    options = {"num_diffusion_samples": 2, "num_sampling_steps": 3, "num_loops": 0}
    longer = {name: np.array(x) for name, x in pad_features([features, protein_features("A" * 20)]).items()}
    alone, padded = models.ours.fold(**features, **options), models.ours.fold(**longer, **options)
    np.testing.assert_allclose(np.array(alone.complex_iplddt), np.array(padded.complex_iplddt)[:2], atol=1e-5)


@pytest.mark.parametrize("sequence", ["M", "X", "G:M"])
def test_one_residue(models: Peers, sequence: str) -> None:
    """Transformers fails for a single residue."""
    output: Any = models.ours.infer_protein(sequence, num_diffusion_samples=1, num_sampling_steps=3)
    assert all(np.isfinite(np.array(value)).all() for value in output.values())


def test_the_pdb_file_is_that_of_its_protein(model: MLXEsmFold2Model) -> None:
    options = {"num_sampling_steps": 4, "num_loops": 0}
    output: Any = model.infer_protein("MKTAY:GGW", num_diffusion_samples=3, **options)
    best = best_sample(output)
    text = model.infer_protein_as_pdb("MKTAY:GGW", num_diffusion_samples=3, **options)
    assert best == int(np.argmax(np.array(output.iptm)))
    assert text == model.infer_protein_as_pdb("MKTAY:GGW", sample_idx=best, num_diffusion_samples=3, **options)
    rows = [line for line in text.splitlines() if line.startswith("ATOM")]
    xyz = [[float(line[at : at + 8]) for at in (30, 38, 46)] for line in rows]
    np.testing.assert_allclose(xyz, np.array(output.sample_atom_coords[best])[: len(rows)], atol=6e-4)
    with pytest.raises(ValueError, match="sample_idx must be between 0 and 2, got 3"):
        model.infer_protein_as_pdb("MKTAY", sample_idx=3, num_diffusion_samples=3, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seeds": 1}, TypeError, "'seeds' is not a feature"),
        ({"num_diffusion_samples": 0}, ValueError, "num_diffusion_samples must be at least 1"),
        ({"num_sampling_steps": 0}, ValueError, "num_sampling_steps must be at least 1"),
        ({"num_loops": -1}, ValueError, "num_loops must be at least 0"),
    ],
)
def test_wrong_arguments(model: MLXEsmFold2Model, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        model.infer_protein("MKT", **options)


# Random numbers


def test_a_result_depends_on_the_seed_alone(models: Peers) -> None:
    """A protein gives the same structure alone, in a batch, and as one of several samples."""
    options = {"num_sampling_steps": 5, "num_loops": 1}
    one, three = "MKTAYIAK:GG", ["ACDEFGHIKLMNPQ", "MKTAYIAK:GG", "AC"]
    alone: Any = models.ours.infer_protein(one, num_diffusion_samples=1, seed=3, **options)
    again: Any = models.ours.infer_protein(one, num_diffusion_samples=3, seed=3, **options)
    other: Any = models.ours.infer_protein(one, num_diffusion_samples=1, seed=4, **options)
    batch: Any = models.ours.infer_protein(three, num_diffusion_samples=2, seed=3, **options)
    atoms = alone.sample_atom_coords.shape[1]
    first = np.array(alone.sample_atom_coords)[0]
    np.testing.assert_allclose(np.array(again.sample_atom_coords)[0], first, atol=1e-3)
    np.testing.assert_allclose(np.array(batch.sample_atom_coords)[2, :atoms], first, atol=1e-3)
    np.testing.assert_allclose(np.array(batch.distogram_logits)[1, :10, :10], alone.distogram_logits[0], atol=1e-3)
    assert np.abs(np.array(other.sample_atom_coords)[0] - first).max() > 1
    assert np.abs(np.array(again.sample_atom_coords)[1] - first).max() > 1


def test_dropout_of_the_language_model(model: MLXEsmFold2Model) -> None:
    """It is drawn in each loop, also in evaluation, with the share of the config."""
    draws = model.draws({name: mx.array(x) for name, x in case("one chain")[0].items()}, seed=0)
    one, two = (np.array(draws.keep(loop, 24, 0.25)) for loop in (0, 1))
    assert abs(one.mean() - 0.75) < 0.02 and (one != two).any()
    state = np.array(draws.state(24, 0.5))
    assert abs(state.std() - 0.5 * 0.9866) < 0.02 and np.abs(state).max() <= 1.5


# Checkpoints


def test_round_trip(models: Peers, tmp_path: Any) -> None:
    """Transformers loads what we write, with identical arrays and config."""
    models.ours.save_pretrained(tmp_path)
    theirs = EsmFold2Model.from_pretrained(tmp_path)
    before = EsmFold2Model.from_pretrained(models.folder).config.to_dict()
    assert theirs.config.to_dict() == before | {"_name_or_path": str(tmp_path)}
    expected = models.theirs.state_dict()
    assert theirs.state_dict().keys() == expected.keys()
    assert all(torch.equal(array, expected[name]) for name, array in theirs.state_dict().items())
    again = MLXAutoModel.from_pretrained(tmp_path)
    ours: Any = dict(tree_flatten(models.ours.parameters()))
    assert all(mx.array_equal(array, ours[name]) for name, array in tree_flatten(again.parameters()))


@pytest.mark.parametrize("way", ["load", "cast"])
def test_half_precision(models: Peers, way: str) -> None:
    """The same parameters as in transformers stay float32, and results are near those of float32."""
    theirs = EsmFold2Model.from_pretrained(models.folder, dtype=torch.bfloat16)
    if way == "load":
        ours = MLXEsmFold2Model.from_pretrained(models.folder, dtype="bfloat16")
    else:
        ours = MLXEsmFold2Model.from_pretrained(models.folder).bfloat16()
    expected = {name: str(x.dtype).removeprefix("torch.") for name, x in theirs.state_dict().items()}
    found: Any = dict(tree_flatten(ours.parameters()))
    assert {name: str(x.dtype).removeprefix("mlx.core.") for name, x in found.items()} == expected
    options = {"num_diffusion_samples": 1, "num_sampling_steps": 5, "num_loops": 1}
    half, whole = (m.infer_protein("MKTAYIAKQR", **options) for m in (ours, models.ours))
    assert np.abs(np.array(half.plddt) - np.array(whole.plddt)).max() < 0.05
    assert np.abs(np.array(half.ptm) - np.array(whole.ptm)).max() < 0.01
