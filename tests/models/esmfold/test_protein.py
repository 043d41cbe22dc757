"""Sequences as residues, and PDB files."""

import gemmi
import numpy as np
import pytest

from mlx_esm_hf.models.esmfold.protein import encode_sequence, pdb_text
from mlx_esm_hf.models.esmfold.residue_constants import ATOM37_MASK, RESTYPES_WITH_X


def protein(chains):
    """Return random arguments of `pdb_text` for chains of residues."""
    random = np.random.default_rng(0)
    aatype = np.array([RESTYPES_WITH_X.index(letter) for letter in "".join(chains)])
    positions = random.uniform(-99, 99, (len(aatype), 37, 3)).astype(np.float32)
    plddt = random.uniform(0, 100, (len(aatype), 37)).astype(np.float32)
    return aatype, np.repeat(np.arange(len(chains)), [*map(len, chains)]), positions, ATOM37_MASK[aatype], plddt


@pytest.mark.parametrize("chains", [["MKTAYIXAKQRQISFVKSHFSRQ"], ["XMKX", "GG", "ACDEFGHIKLMNPQRSTVWY"], ["W"] * 62])
def test_gemmi_writes_the_same_file(chains):
    text = pdb_text(*protein(chains), "Structure of a protein")
    structure = gemmi.read_pdb_string(text)
    structure.setup_entities()
    assert structure.make_pdb_string() == text


def test_rounding():
    """Decimals that end in 5 are rounded upward, as in other files of the PDB, and there is no negative zero."""
    aatype, chains, positions, exists, plddt = protein(["G"])
    positions[0, 0] = [-0.0004, 0.0625, -0.0625]
    plddt[0, 0] = 0.125
    atom = next(line for line in pdb_text(aatype, chains, positions, exists, plddt).splitlines() if "ATOM" in line)
    assert atom[30:66] == "   0.000   0.063  -0.062  1.00  0.13"


def test_long_titles_continue():
    lines = pdb_text(*protein(["G"]), "word " * 40).splitlines()
    assert [line[:11] for line in lines[:4]] == ["TITLE     W", "TITLE    2 ", "TITLE    3 ", "SEQRES   1 "]
    assert {len(line) for line in lines} == {80}


def test_too_many_chains():
    with pytest.raises(ValueError, match="at most 62 chains, got 63. Write mmCIF instead"):
        pdb_text(*protein(["G"] * 63))


def test_encode_sequence():
    aatype, positions, chains, linkers = encode_sequence("MJ:A", 100, "GG")
    assert "".join(RESTYPES_WITH_X[i] for i in aatype) == "MXGGA"
    assert positions.tolist() == [0, 1, 2, 3, 104]
    assert chains.tolist() == [0, 0, 0, 0, 1] and linkers.tolist() == [0, 0, 1, 1, 0]
