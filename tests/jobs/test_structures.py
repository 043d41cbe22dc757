"""The files of a structure, read by other libraries."""

import io
import json
import re
from dataclasses import dataclass

import gemmi
import modelcif.reader
import numpy as np
import pytest
from biotite.structure.io import pdb, pdbx

from mlx_esm_hf import MLXEsmForProteinFolding, fold
from mlx_esm_hf.jobs import structures
from mlx_esm_hf.models.esmfold.residue_constants import ATOM37, ATOM37_MASK, RESIDUE_NAMES, RESTYPES, RESTYPES_WITH_X
from mlx_esm_hf.runs.job import Result
from tests.jobs.models import write_folding_model

# An mmCIF file says the name of an atom once.
pytestmark = pytest.mark.filterwarnings("ignore:Attribute 'auth_atom_id' not found")

# All residues; X at an end, and inside; chains that are alike.
ID = "sp|P12345|FOUR 'chains'; \"$é\\"
CHAINS = ["ACDEFGHIKLMNPQRSTVWYX", "XMKXXTAYI", "GG", "XMKXXTAYI"]


@pytest.fixture(scope="module")
def folding(tmp_path_factory):
    return MLXEsmForProteinFolding.from_pretrained(write_folding_model(tmp_path_factory.mktemp("fold")))


@pytest.fixture(scope="module")
def result(folding):
    (result,) = fold([(ID, ":".join(CHAINS))], folding)
    return result


@dataclass
class Read:
    """The atoms of a file, in its order."""

    chains: list
    numbers: list
    residues: list
    names: list
    positions: np.ndarray
    plddt: np.ndarray


def expected(result):
    """Return the atoms that a file must contain."""
    read = Read([], [], [], [], [], [])
    starts = np.cumsum([0, *map(len, CHAINS)])
    for place, residue in enumerate(result.arrays["aatype"]):
        chain = int(np.searchsorted(starts, place, side="right")) - 1
        for atom in np.flatnonzero(ATOM37_MASK[residue]):
            read.chains.append("ABCD"[chain])
            read.numbers.append(place - starts[chain] + 1)
            read.residues.append(RESIDUE_NAMES[residue])
            read.names.append(ATOM37[atom])
            read.positions.append(result.arrays["positions"][place, atom])
            read.plddt.append(result.arrays["plddt"][place, atom])
    return read


def by_gemmi(text, suffix):
    if suffix == "pdb":
        structure = gemmi.read_pdb_string(text)
    else:
        structure = gemmi.make_structure_from_block(gemmi.cif.read_string(text).sole_block())
    assert len(structure) == 1
    atoms = [(c.name, r.seqid.num, r.name, a.name, a.pos.tolist(), a.b_iso) for c in structure[0] for r in c for a in r]
    return Read(*map(list, zip(*atoms, strict=True)))


def by_biotite(text, suffix):
    file = io.StringIO(text)
    if suffix == "pdb":
        atoms = pdb.PDBFile.read(file).get_structure(model=1, extra_fields=["b_factor"])
    else:
        atoms = pdbx.get_structure(pdbx.CIFFile.read(file), model=1, extra_fields=["b_factor"])
    names = (list(getattr(atoms, name)) for name in ("chain_id", "res_id", "res_name", "atom_name"))
    return Read(*names, atoms.coord, atoms.b_factor)


@pytest.mark.parametrize("read", [by_gemmi, by_biotite])
@pytest.mark.parametrize(("suffix", "make"), [("pdb", structures.pdb), ("cif", structures.mmcif)])
def test_files_are_read_back_by_other_libraries(result, suffix, make, read):
    """Chains, numbers, atoms, coordinates and B factors match; linkers and X have no atoms."""
    ours, theirs = expected(result), read(make(result).decode(), suffix)
    for name in ("chains", "numbers", "residues", "names"):
        assert getattr(theirs, name) == getattr(ours, name), name
    np.testing.assert_allclose(theirs.positions, ours.positions, atol=1e-3)
    np.testing.assert_allclose(theirs.plddt, ours.plddt, atol=0.006)
    assert np.ptp(ours.plddt) > 5 and np.min(ours.plddt) > 0 and np.max(ours.plddt) < 100
    assert np.ptp(ours.positions, axis=0).min() > 5  # a structure, not a point


@pytest.mark.parametrize(("suffix", "make"), [("pdb", structures.pdb), ("cif", structures.mmcif)])
def test_sequences_contain_all_residues(result, suffix, make):
    text = make(result).decode()
    structure = gemmi.read_pdb_string(text) if suffix == "pdb" else None
    if structure is None:
        structure = gemmi.make_structure_from_block(gemmi.cif.read_string(text).sole_block())
    structure.setup_entities()
    found = [structure.get_entity_of(chain.get_polymer()).full_sequence for chain in structure[0]]
    assert found == [[RESIDUE_NAMES[RESTYPES_WITH_X.index(letter)] for letter in chain] for chain in CHAINS]


def angle(a, b, c):
    u, v = a - b, c - b
    return np.degrees(np.arccos((u * v).sum(-1) / np.linalg.norm(u, axis=-1) / np.linalg.norm(v, axis=-1)))


@pytest.mark.parametrize(("suffix", "make"), [("pdb", structures.pdb), ("cif", structures.mmcif)])
def test_backbone_has_ideal_geometry(result, suffix, make):
    """Within the precision of the file, 0.001 Å."""
    read = by_gemmi(make(result).decode(), suffix)
    names, positions = np.array(read.names), np.array(read.positions)
    nitrogen, alpha, carbon = (positions[names == name] for name in ("N", "CA", "C"))
    assert len(nitrogen) == len(alpha) == len(carbon) == sum(letter != "X" for chain in CHAINS for letter in chain)
    np.testing.assert_allclose(np.linalg.norm(alpha - nitrogen, axis=1), 1.46, atol=0.01)
    np.testing.assert_allclose(np.linalg.norm(carbon - alpha, axis=1), 1.525, atol=0.01)
    np.testing.assert_allclose(angle(nitrogen, alpha, carbon), 111, atol=2.5)


def test_pdb_lines_have_80_columns(result):
    lines = structures.pdb(result).decode().splitlines()
    assert {len(line) for line in lines} == {80}
    assert [line[:6].strip() for line in lines if not line.startswith(("ATOM", "SEQRES"))] == [
        "TITLE",
        "CRYST1",
        *["TER"] * 4,
        "END",
    ]


def test_modelcif_contains_quality_scores(result):
    block = gemmi.cif.read_string(structures.mmcif(result).decode()).sole_block()
    table = block.find("_ma_qa_metric.", ["id", "name", "type", "mode"])
    metrics = {row[0]: tuple(map(gemmi.cif.as_string, list(row)[1:])) for row in table}
    assert sorted(metrics.values()) == [
        ("pLDDT", "pLDDT", "global"),
        ("pLDDT", "pLDDT", "local"),
        ("pTM", "normalized score", "global"),
    ]
    overall = {
        metrics[row[0]][0]: float(row[1]) for row in block.find("_ma_qa_metric_global.", ["metric_id", "metric_value"])
    }
    assert overall["pLDDT"] == pytest.approx(result.arrays["mean_plddt"][0], abs=1e-3)
    assert overall["pTM"] == pytest.approx(result.arrays["ptm"][0], abs=1e-3)
    local = block.find("_ma_qa_metric_local.", ["label_asym_id", "label_seq_id", "label_comp_id", "metric_value"])
    read = by_gemmi(structures.mmcif(result).decode(), "cif")
    alphas = [i for i, name in enumerate(read.names) if name == "CA"]
    assert [(row[0], int(row[1]), row[2]) for row in local] == [
        (read.chains[i], read.numbers[i], read.residues[i]) for i in alphas
    ]
    np.testing.assert_allclose([float(row[3]) for row in local], [read.plddt[i] for i in alphas], atol=1e-3)


def test_modelcif_reads_the_file(result):
    (system,) = modelcif.reader.read(io.StringIO(structures.mmcif(result).decode()))
    assert system.id == "P12345" and system.title == "ESMFold prediction for sp|P12345|FOUR 'chains'; ?$??"
    assert [len(entity.sequence) for entity in system.entities] == [21, 9, 2]  # two chains are alike
    assert [unit.id for unit in system.asym_units] == ["A", "B", "C", "D"]
    ((group, model),) = system._all_models()
    assert model.model_type == "Ab initio model"
    assert system.protocols[0].steps[0].software[0].name == "mlx-esm-hf"


@pytest.mark.parametrize("id", ["DATA_1", "#1", ";x", "loop_", "_x", "$x", "'", '"', "?", ".", "[x]", "x" * 300])
def test_ids_with_special_meaning_in_files(result, id):
    named = result._replace(id=id)
    block = gemmi.cif.read_string(structures.mmcif(named).decode()).sole_block()
    assert gemmi.cif.as_string(block.find_value("_struct.title")).endswith(id[:200].replace('"', "?"))
    entry = gemmi.cif.as_string(block.find_value("_entry.id"))
    assert entry == structures.entry_of(named) and block.name == entry.replace(".", "")
    assert len(by_gemmi(structures.pdb(named).decode(), "pdb").names) == len(expected(result).names)


def test_bytes_are_reproducible(result):
    for make in (
        structures.pdb,
        structures.mmcif,
        structures.aligned_error_json,
        structures.confidence_npz,
        structures.plddt_picture,
        structures.aligned_error_picture,
    ):
        assert make(result) == make(result)


def test_aligned_error_in_the_layout_of_alphafold_db(result):
    text = structures.aligned_error_json(result).decode()
    ((key, error), (largest, value)) = json.loads(text)[0].items()
    assert (key, largest, value) == ("predicted_aligned_error", "max_predicted_aligned_error", 31.75)
    assert re.fullmatch(r'\[\{"[a-z_]+":\[(\[\d+(,\d+)*\],?)+\],"[a-z_]+":31\.75\}\]', text)
    length = sum(map(len, CHAINS))
    assert np.array(error).shape == (length, length)
    assert np.abs(np.array(error) - result.arrays["predicted_aligned_error"]).max() <= 0.5


def test_confidence_npz(result):
    with np.load(io.BytesIO(structures.confidence_npz(result))) as file:
        arrays = dict(file)
    known = result.arrays["aatype"] < len(RESTYPES)
    assert np.isnan(arrays["plddt"][~known]).all()
    np.testing.assert_array_equal(arrays["plddt"][known], result.arrays["plddt"][known, ATOM37.index("CA")])
    for name in ("predicted_aligned_error", "chain_index", "ptm", "mean_plddt"):
        np.testing.assert_array_equal(arrays[name], result.arrays[name])


@pytest.mark.parametrize("draw", [structures.plddt_picture, structures.aligned_error_picture])
def test_pictures(result, draw):
    from matplotlib.image import imread

    picture = imread(io.BytesIO(draw(result)))
    assert picture.shape[0] > 300 and picture.std() > 0.01


def made_up(chains):
    """Make a result of glycines in chains of these lengths."""
    length = sum(chains)
    random = np.random.default_rng(0)
    glycine = RESTYPES.index("G")
    return Result(
        0,
        "big",
        length,
        {
            "aatype": np.full(length, glycine, np.int32),
            "chain_index": np.repeat(np.arange(len(chains)), chains).astype(np.int32),
            "positions": random.uniform(-999, 999, (length, 37, 3)).astype(np.float32),
            "plddt": random.uniform(0, 100, (length, 37)).astype(np.float32),
            "mean_plddt": np.array([50.0], np.float32),
            "ptm": np.array([0.5], np.float32),
        },
    )


@pytest.mark.parametrize(
    ("chains", "message"),
    [
        ([10_000], "has 10,000 residues in a chain, but a PDB file has at most 9,999"),
        ([2] * 63, "has 63 chains, but a PDB file has at most 62"),
        ([9_000, 9_000, 7_000], "has 100,003 atoms, but a PDB file has at most 99,999"),
    ],
)
def test_limits_of_pdb_files_are_checked(chains, message):
    arrays = made_up(chains).arrays
    with pytest.raises(ValueError, match=f"^{message}: use mmCIF"):
        structures.refuse_for_pdb(arrays["aatype"], arrays["chain_index"])


@pytest.mark.parametrize("chains", [[9_999], [1] * 62])
def test_largest_pdb_files(chains):
    result = made_up(chains)
    structures.refuse_for_pdb(result.arrays["aatype"], result.arrays["chain_index"])
    read = by_gemmi(structures.pdb(result).decode(), "pdb")
    assert len(read.names) == 4 * sum(chains) and len(set(read.chains)) == len(chains)
    assert max(read.numbers) == max(chains)
    np.testing.assert_allclose(
        read.positions, result.arrays["positions"][:, ATOM37_MASK[7] > 0].reshape(-1, 3), atol=1e-3
    )


@pytest.mark.parametrize("chains", [[10_001], [1] * 100])
def test_mmcif_has_no_such_limits(chains):
    result = made_up(chains)
    read = by_biotite(structures.mmcif(result).decode(), "cif")
    assert len(read.names) == 4 * sum(chains) and len(set(read.chains)) == len(chains)
    assert max(read.numbers) == max(chains)


def shaped(sequence, id="a", name="a"):
    """Return a result of this sequence with random numbers."""
    chains, rng = sequence.split(":"), np.random.default_rng(0)
    aatype = np.array([RESTYPES_WITH_X.index(letter) for letter in "".join(chains)], np.int32)
    L = len(aatype)
    arrays = {
        "aatype": aatype,
        "chain_index": np.repeat(np.arange(len(chains), dtype=np.int32), list(map(len, chains))),
        "positions": rng.normal(size=(L, 37, 3)).astype(np.float32),
        "plddt": np.full((L, 37), 50, np.float32),
        "predicted_aligned_error": np.full((L, L), 5, np.float32),
    }
    return Result(0, id, L, arrays | {n: np.ones(1, np.float32) for n in ("mean_plddt", "ptm")}, name)


@pytest.mark.parametrize("sequence", ["MKT:XX", "XX:MKT", "XX:MKT:XX", "X:M", "XXX:A:XXX:XX", "M"])
def test_chains_of_unknown_residues(sequence):
    """They are in the sequence as UNK, and have no atoms."""
    result, chains = shaped(sequence), sequence.split(":")
    structure = gemmi.make_structure_from_block(gemmi.cif.read_string(structures.mmcif(result).decode())[0])
    structure.setup_entities()
    found = {s: entity.full_sequence for entity in structure.entities for s in entity.subchains}
    assert [len(found[name]) for name, chain in zip("ABCD", chains, strict=False) if set(chain) != {"X"}]
    with_atoms = [name for name, chain in zip("ABCD", chains, strict=False) if set(chain) != {"X"}]
    assert [chain.name for chain in structure[0]] == with_atoms
    (system,) = modelcif.reader.read(io.StringIO(structures.mmcif(result).decode()))
    assert [len(unit.entity.sequence) for unit in system.asym_units] == list(map(len, chains))
    assert structures.pdb(result).count(b"UNK") == sequence.count("X")


def test_a_thousand_chains():
    text = structures.mmcif(shaped(":".join(["M"] * 1000))).decode()
    structure = gemmi.make_structure_from_block(gemmi.cif.read_string(text)[0])
    assert len(structure[0]) == 1000 and structure[0][-1].name == "AKB"
