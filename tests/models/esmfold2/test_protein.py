"""PDB files of complexes, read back by gemmi and compared with transformers'."""

import gemmi
import numpy as np
import pytest
import torch
from transformers.models.esmfold2 import protein_utils

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.models.esmfold2 import protein
from mlx_esm_hf.models.esmfold2.features import pad_features, protein_features
from mlx_esm_hf.models.esmfold2.protein import ELEMENTS, output_to_pdb
from mlx_esm_hf.models.esmfold2.residues import decode_name, encode_name

ALL = "ARNDCQEGHILKMFPSTWYVX"


def structure(sequence):
    """Return random arguments of `output_to_pdb`."""
    features = protein_features(sequence)
    atoms = features["ref_pos"].shape[1]
    random = np.random.default_rng(0)
    coords = random.uniform(-99, 99, (atoms, 3)).astype(np.float32)
    return features, coords, random.uniform(0, 1, atoms).astype(np.float32)


def complex_with_ligands():
    """Return a peptide with a modified residue, an RNA, a DNA, and heme-like ligands, as features of hand-made atoms.

    Chains: A is GLY, a modified residue of two atoms and a ligand; B is RNA; C is DNA; D is a ligand of two residues.
    """
    tokens = [  # asym_id, residue_index, mol_type, res_type, {atom: element}
        (0, 0, 0, 9, {"N": 7, "CA": 6, "C": 6, "O": 8}),
        (0, 1, 0, 22, {"N": 7}),
        (0, 1, 0, 22, {"SE": 34}),
        (0, 2, 3, 22, {"ZN": 30}),
        (1, 0, 2, 23, {"P": 15, "O5'": 8}),
        (1, 1, 2, 26, {"HO5'": 1}),
        (2, 0, 1, 31, {"C1'": 6}),
        (3, 0, 3, 22, {"FE": 26}),
        (3, 0, 3, 22, {"C12": 6}),
        (3, 1, 3, 22, {"CL1": 17}),
        (3, 1, 3, 22, {"QX12": 119}),
    ]
    asym, residue, mol, res, atoms = zip(*tokens, strict=True)
    names = [(name, element) for one in atoms for name, element in one.items()]
    return {
        "asym_id": np.array([asym]),
        "residue_index": np.array([residue]),
        "mol_type": np.array([mol]),
        "res_type": np.array([res]),
        "attention_mask": np.ones((1, len(tokens)), dtype=bool),
        "atom_to_token": np.repeat(np.arange(len(tokens)), [*map(len, atoms)])[None],
        "atom_attention_mask": np.ones((1, len(names)), dtype=bool),
        "ref_atom_name_chars": np.array([[encode_name(name) for name, _ in names]]),
        "ref_element": np.array([[element for _, element in names]]),
        "input_ids": None,
    }


@pytest.mark.parametrize("sequence", [ALL, "MKTAYIAKQRQISFVKSHFSRQ:GG:X", ":".join("W" * 62)])
def test_gemmi_writes_the_same_file(sequence):
    text = output_to_pdb(*structure(sequence), title="Structure of a protein")
    read = gemmi.read_pdb_string(text)
    read.setup_entities()
    assert read.make_pdb_string() == text


def test_gemmi_reads_the_atoms():
    features, coords, plddt = structure("MKX:GW")
    model = gemmi.read_pdb_string(output_to_pdb(features, coords, plddt))[0]
    assert [(chain.name, [(r.name, r.seqid.num) for r in chain]) for chain in model] == [
        ("A", [("MET", 1), ("LYS", 2), ("UNK", 3)]),
        ("B", [("GLY", 1), ("TRP", 2)]),
    ]
    atoms = [atom.atom for atom in model.all()]
    exists = features["atom_attention_mask"][0]
    assert [atom.name for atom in atoms] == [decode_name(x) for x in features["ref_atom_name_chars"][0][exists]]
    assert [atom.element.atomic_number for atom in atoms] == features["ref_element"][0][exists].tolist()
    np.testing.assert_allclose([atom.pos.tolist() for atom in atoms], coords[exists], atol=5.1e-4)
    np.testing.assert_allclose([atom.b_iso for atom in atoms], 100 * plddt[exists], atol=5.1e-3)
    assert {atom.occ for atom in atoms} == {1}


def test_atoms_are_those_of_transformers():
    """Its B factor is the pLDDT of the token, from 0 to 1, and its first line is not of the format."""
    features, coords, plddt = structure("MKTAYIAKQRQISFVKSHFSRQ:GGWX")
    output = {
        "sample_atom_coords": torch.tensor(coords)[None],
        "plddt": torch.tensor(plddt)[None, : features["token_index"].shape[1]],
    }
    tensors = {name: torch.tensor(array) for name, array in features.items()}
    theirs = protein_utils.output_to_pdb(output, tensors, sample_idx=0).splitlines()
    ours = output_to_pdb(features, coords, plddt).splitlines()
    kept = [[line for line in lines if line[:4] in ("ATOM", "TER ")] for lines in (ours, theirs)]
    assert [line[:60].rstrip() for line in kept[0]] == [line[:60].rstrip() for line in kept[1]]
    assert [line[66:].rstrip() for line in kept[0]] == [line[66:].rstrip() for line in kept[1]]


def test_ligands_and_nucleic_acids():
    features = complex_with_ligands()
    atoms = features["atom_to_token"].shape[1]
    text = output_to_pdb(features, np.arange(3.0 * atoms).reshape(atoms, 3), np.linspace(0, 1, atoms))
    lines = [line[:27] for line in text.splitlines() if line[:6] in ("ATOM  ", "HETATM", "TER   ")]
    assert lines == [
        "ATOM      1  N   GLY A   1 ",
        "ATOM      2  CA  GLY A   1 ",
        "ATOM      3  C   GLY A   1 ",
        "ATOM      4  O   GLY A   1 ",
        "ATOM      5  N   UNK A   2 ",
        "ATOM      6 SE   UNK A   2 ",
        "TER       7      UNK A   2 ",
        "HETATM    8 ZN   LIG A   3 ",
        "ATOM      9  P     A B   1 ",
        "ATOM     10  O5'   A B   1 ",
        "ATOM     11 HO5'   U B   2 ",
        "TER      12        U B   2 ",
        "ATOM     13  C1'  DT C   1 ",
        "TER      14       DT C   1 ",
        "HETATM   15 FE   LIG D   1 ",
        "HETATM   16  C12 LIG D   1 ",
        "HETATM   17 CL1  LIG D   2 ",
        "HETATM   18 QX12 LIG D   2 ",
    ]
    assert {len(line) for line in text.splitlines()} == {80}
    assert [line.rstrip() for line in text.splitlines() if line.startswith("SEQRES")] == [
        "SEQRES   1 A    2  GLY UNK",
        "SEQRES   1 B    2    A   U",
        "SEQRES   1 C    1   DT",
    ]
    read = gemmi.read_pdb_string(text)
    read.setup_entities()
    written = read.make_pdb_string().splitlines(keepends=True)
    assert "".join(line for line in written if not line.startswith("HET ")) == text
    elements = [atom.atom.element.name for atom in read[0].all()]
    assert elements == ["N", "C", "C", "O", "N", "Se", "Zn", "P", "O", "H", "C", "Fe", "C", "Cl", "X"]
    kinds = {chain.name: [residue.entity_type.name for residue in chain] for chain in read[0]}
    assert kinds["A"] == ["Polymer", "Polymer", "NonPolymer"] and kinds["D"] == ["NonPolymer"] * 2


def test_elements():
    assert ELEMENTS[1:] == [gemmi.Element(number).name.upper() for number in range(1, 110)]


def test_chains_are_written_in_the_order_of_their_letters():
    features, coords, plddt = structure("GG:A")
    features["asym_id"] = np.array([[2, 2, 0]])
    text = output_to_pdb(features, coords, plddt)
    assert [line[21] for line in text.splitlines() if line.startswith("TER")] == ["A", "C"]


def test_padding_is_not_written():
    features, coords, plddt = structure("GX")
    batch = pad_features([features, protein_features("WWWWWWW")])
    row = {name: array[:1] for name, array in batch.items()}
    rest = row["ref_pos"].shape[1] - len(coords)
    padded = np.pad(coords, [(0, rest), (0, 0)], constant_values=np.nan), np.pad(plddt, (0, rest))
    assert output_to_pdb(row, *padded) == output_to_pdb(features, coords, plddt)


def test_limits_of_coordinates_and_chains():
    features, coords, plddt = structure("GA")
    last = np.flatnonzero(features["atom_attention_mask"][0])[-1]
    for value in (9999.9995, -999.9995, np.nan, np.inf):
        wrong = coords.astype(np.float64)
        wrong[last, 1] = value
        with pytest.raises(UserError, match="coordinates of a PDB file must be from -999.999 to 9999.999 Å, got"):
            output_to_pdb(features, wrong, plddt)
    coords[last] = [9999.999, -999.999, 0]
    line = output_to_pdb(features, coords, plddt).splitlines()[-3]
    assert line[26:60] == "    9999.999-999.999   0.000  1.00"
    with pytest.raises(UserError, match="at most 62 chains, got 63. Write mmCIF instead"):
        output_to_pdb(*structure(":".join("G" * 63)))


def test_residue_numbers():
    features, coords, plddt = structure("GA")
    for numbers in ([-1000, 0], [0, 9998]):
        features["residue_index"] = np.array([numbers])
        chain = gemmi.read_pdb_string(output_to_pdb(features, coords, plddt))[0][0]
        assert [residue.seqid.num - 1 for residue in chain] == numbers
    for numbers, wrong in (([-1001, 0], "-1,000"), ([0, 9999], "10,000")):
        features["residue_index"] = np.array([numbers])
        with pytest.raises(UserError, match=f"from -999 to 9,999, got residue {wrong}. Write mmCIF instead"):
            output_to_pdb(features, coords, plddt)


def test_most_atoms(monkeypatch):
    """TER records have numbers like atoms and count as well."""
    features = complex_with_ligands()
    atoms = features["atom_to_token"].shape[1]
    arguments = features, np.zeros((atoms, 3)), np.zeros(atoms)
    monkeypatch.setattr(protein, "PDB_ATOMS", 18)
    assert "\nHETATM   18 " in output_to_pdb(*arguments)
    monkeypatch.setattr(protein, "PDB_ATOMS", 17)
    with pytest.raises(UserError, match="at most 17 atoms and ends of chains, got 18. Write mmCIF instead"):
        output_to_pdb(*arguments)


def test_shapes():
    features, coords, plddt = structure("GA")
    with pytest.raises(UserError, match=r"must have shapes \(32, 3\) and \(32,\), got \(31, 3\) and \(32,\)"):
        output_to_pdb(features, coords[1:], plddt)
    with pytest.raises(UserError, match=r"got \(32, 3\) and \(1, 32\)"):
        output_to_pdb(features, coords, plddt[None])
    with pytest.raises(UserError, match="must be of one protein, got a batch of 2"):
        output_to_pdb(pad_features([features, features]), coords, plddt)
