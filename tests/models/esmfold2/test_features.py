"""Features of proteins, alignments and batches."""

import gzip

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import EsmcTokenizer
from transformers.models.esmfold2 import protein_utils

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.models.esmfold.residue_constants import RESIDUES, RESTYPES_WITH_X
from mlx_esm_hf.models.esmfold2.features import (
    FEATURES,
    Msa,
    check_features,
    join_msas,
    pad_features,
    protein_features,
    read_a3m,
)
from mlx_esm_hf.models.esmfold2.residues import (
    COMPONENTS,
    GAP,
    INPUT_IDS,
    NUCLEOTIDES,
    RES_TYPES,
    decode_name,
    encode_name,
    residue_atoms,
)

ALL = "ARNDCQEGHILKMFPSTWYVX"


# Residues


@pytest.mark.parametrize("letter", ALL)
def test_residues_are_those_of_transformers(letter):
    name, atoms = protein_utils.PROTEIN_1TO3[letter], residue_atoms()[letter]
    positions = [protein_utils.PROTEIN_REF_POS[name][atom] for atom in atoms.names]
    charges = [protein_utils.PROTEIN_CHARGED_ATOMS.get((name, atom), 0) for atom in atoms.names]
    assert atoms.names == protein_utils.PROTEIN_HEAVY_ATOMS[name]
    np.testing.assert_array_equal(atoms.positions, np.array(positions, dtype=np.float32))
    assert atoms.charges.tolist() == charges
    assert INPUT_IDS[letter] == protein_utils.ESM_PROTEIN_VOCAB[letter]
    assert COMPONENTS[RES_TYPES[letter]] == name


def test_residues_are_those_of_esmfold():
    assert {letter: list(residue.atoms) for letter, residue in RESIDUES.items()} == {
        letter: atoms.names for letter, atoms in residue_atoms().items() if letter != "X"
    }
    assert "".join(RES_TYPES) == RESTYPES_WITH_X


def test_input_ids_are_those_of_the_tokenizer():
    tokenizer = EsmcTokenizer()
    assert {letter: tokenizer.convert_tokens_to_ids(letter) for letter in ALL[:-1]} | {
        "X": tokenizer.unk_token_id
    } == INPUT_IDS


def test_each_residue_type_has_a_name():
    assert sorted(COMPONENTS) == list(range(2, 33))
    assert COMPONENTS[NUCLEOTIDES["RNA"]["U"]] == "U" and COMPONENTS[NUCLEOTIDES["DNA"]["T"]] == "DT"


@pytest.mark.parametrize("name", ["N", "CA", "OXT", "HO5'", "C1*", ""])
def test_names_of_atoms(name):
    assert encode_name(name) == protein_utils._encode_atom_name(name)
    assert decode_name(np.array(encode_name(name))) == name


# Proteins


@pytest.mark.parametrize("sequence", [ALL, "G", "X", "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ", "A" * 32])
def test_a_chain_is_bit_identical_to_transformers(sequence):
    expected = protein_utils.prepare_protein_features(sequence)
    features = protein_features(sequence)
    assert features.keys() == expected.keys() == FEATURES.keys()
    for name, array in features.items():
        assert array.dtype == expected[name].numpy().dtype, name
        np.testing.assert_array_equal(array, expected[name].numpy(), err_msg=name, strict=True)


def test_chains():
    features = {name: array[0] for name, array in protein_features("MK:GAG:MK:MK").items()}
    assert features["asym_id"].tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert features["entity_id"].tolist() == [1, 1, 2, 2, 2, 1, 1, 1, 1]
    assert features["sym_id"].tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 2]
    assert features["residue_index"].tolist() == [0, 1, 0, 1, 2, 0, 1, 0, 1]
    assert features["token_index"].tolist() == list(range(9))
    assert features["ref_space_uid"].tolist() == features["atom_to_token"].tolist()
    # What does not know chains is that of one chain of all residues.
    whole = protein_utils.prepare_protein_features("MKGAGMKMK")
    for name in whole.keys() - {"asym_id", "entity_id", "sym_id", "residue_index"}:
        np.testing.assert_array_equal(features[name], whole[name][0].numpy(), err_msg=name, strict=True)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ("", "'' cannot be folded: the sequence is empty"),
        ("MK::A", "'MK::A' cannot be folded: the sequence is empty, in chain 2"),
        ("MK:", "empty, in chain 2"),
        ("MkT", "'k' at position 2 must be a capital letter of the 20 residues or X"),
        ("MK:AB", "'B' at position 2, in chain 2 must"),
        ("M-K", "'-' at position 2"),
        ("MK T", "' ' at position 3"),
        ("MKä", "'ä' at position 3"),
        ("M" * 50 + "1", "'M{40}...' cannot be folded: '1' at position 51"),
    ],
)
def test_other_letters_are_refused(sequence, message):
    with pytest.raises(UserError, match=message):
        protein_features(sequence)


# Alignments


def a3m(folder, text, name="chain.a3m"):
    (folder / name).write_text(text)
    return folder / name


def letters(rows):
    """Return residue types as text."""
    names = {number: letter for letter, number in RES_TYPES.items()} | {GAP: "-"}
    return ["".join(names[int(number)] for number in row) for row in rows]


def test_read_a3m(tmp_path):
    msa = read_a3m(a3m(tmp_path, ">q\nMK\nTA\n>a key=9\naaMbKTcc-d\n>b key=-1\n--XB\n>c\n.MK.UJ\n"))
    assert letters(msa.rows) == ["MKTA", "MKT-", "--XX", "MKXX"]
    assert msa.deletions.tolist() == [[0, 0, 0, 0], [2, 1, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert msa.keys == ["", "9", "", ""]
    assert msa.unknown == 3  # B, U and J, but not X


def test_compressed_alignments_and_those_of_colabfold(tmp_path):
    text = "#4\t1\n>101\nMKTA\n>UniRef100_A\tkey=7\nMKT-\n"
    (tmp_path / "chain.a3m.gz").write_bytes(gzip.compress(text.encode()))
    for path in (a3m(tmp_path, text), str(tmp_path / "chain.a3m.gz")):
        msa = read_a3m(path)
        assert letters(msa.rows) == ["MKTA", "MKT-"] and msa.keys == ["", "7"]


def test_max_rows_of_a_file(tmp_path):
    path = a3m(tmp_path, ">q\nMK\n>a\nM-\n>b\nM\n")
    assert letters(read_a3m(path, max_rows=2).rows) == ["MK", "M-"]
    with pytest.raises(UserError, match="max_rows must be an integer from 1"):
        read_a3m(path, max_rows=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (">q\nMK\n>a\nMKT\n", "chain.a3m, line 3: the row has 3 columns, expected 2"),
        (">q\nMK\n>a\nM1\n", "line 3: '1' is not a residue or gap"),
        (">q\nMK\n>a\nM*\n", r"line 3: '\*' is not a residue"),
        (">q\nMK\n>a\nMä\n", "line 3: '.' is not a residue"),
        (">q\nmk\n>a\nMK\n", "line 1: the row has 0 columns, expected at least 1"),
        ("MK\n", "line 1: this is not FASTA"),
        ("", "chain.a3m contains no alignment: the file is empty"),
        ("#2\t1\n", "the file is empty"),
    ],
)
def test_bad_alignments(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_a3m(a3m(tmp_path, text))


def test_missing_alignments(tmp_path):
    with pytest.raises(UserError, match="File not found: .*none.a3m"):
        read_a3m(tmp_path / "none.a3m")
    with pytest.raises(UserError, match="is a folder. Expected an alignment in A3M format"):
        read_a3m(tmp_path)


def test_an_alignment_as_features(tmp_path):
    """The formulas of Biohub's compute_msa_features in torch."""
    msa = read_a3m(a3m(tmp_path, ">q\nMKTA\n>a\naaMKaaaaaT-\n>b\nM--aaaA\n"))
    features = protein_features("MKTA", [msa])
    counts = torch.tensor([[0.0, 0, 0, 0], [2, 0, 5, 0], [0, 0, 0, 3]])
    value = (np.pi / 2) * torch.arctan(counts / 3)
    np.testing.assert_array_equal(features["has_deletion"][0], counts > 0, strict=True)
    np.testing.assert_allclose(features["deletion_value"][0], value, rtol=2e-7, strict=True)
    np.testing.assert_allclose(features["deletion_mean"][0], value.mean(dim=0), rtol=2e-7, strict=True)
    assert letters(features["msa"][0]) == ["MKTA", "MKT-", "M--A"]
    assert features["msa"].dtype == np.int64 and features["msa_attention_mask"].shape == (1, 3, 4)
    assert features["msa_attention_mask"].dtype == bool and features["msa_attention_mask"].all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("MKSA", "chain.a3m: the first row .* but residue 3 is S, expected T"),
        ("M-TA", "residue 2 is -, expected K"),
        ("MKT", "has 3 residues, expected 4"),
        ("MKTAA", "has 5 residues, expected 4"),
    ],
)
def test_the_first_row_must_be_the_chain(tmp_path, row, message):
    msa = read_a3m(a3m(tmp_path, f">q\n{row}\n"))
    with pytest.raises(UserError, match=message):
        protein_features("MKTA", [msa])


def test_unknown_residues_of_the_first_row_match_x(tmp_path):
    msa = read_a3m(a3m(tmp_path, ">q\nMUTA\n"))
    assert letters(protein_features("MXTA", [msa])["msa"][0]) == ["MXTA"]


def alignment(*rows):
    """Return an alignment of (key, letters) pairs."""
    types = np.array([[RES_TYPES.get(letter, GAP) for letter in row] for _, row in rows])
    return Msa(types, np.arange(types.size).reshape(types.shape), [key for key, _ in rows])


def test_rows_with_the_same_key_are_paired():
    first = alignment(("", "MK"), ("", "AA"), ("9", "CC"), ("7", "DD"), ("9", "EE"), ("5", "FF"))
    second = alignment(("", "G"), ("7", "H"), ("9", "I"), ("", "L"), ("", "N"))
    rows, deletions = join_msas(["MK", "G"], [first, second])
    # The query; keys 9 (twice: the second chain repeats its row) and 7; the other rows side by side.
    assert letters(rows) == ["MKG", "CCI", "EEI", "DDH", "AAL", "FFN"]
    assert deletions.tolist() == [[0, 1, 0], [4, 5, 2], [8, 9, 2], [6, 7, 1], [2, 3, 3], [10, 11, 4]]


def test_a_chain_without_a_key_takes_its_next_row():
    first = alignment(("", "M"), ("1", "A"), ("2", "C"))
    second = alignment(("", "G"), ("2", "H"), ("1", "I"))
    third = alignment(("", "S"), ("3", "T"), ("2", "V"))
    rows, _ = join_msas(["M", "G", "S", "MK"], [first, second, third, None])
    assert letters(rows) == ["MGSMK", "CHV--", "AIT--"]


def test_chains_without_alignment_have_gaps():
    features = protein_features("MK:G:MK", [None, alignment(("", "G"), ("", "A"), ("", "C")), None])
    assert letters(features["msa"][0]) == ["MKGMK", "--A--", "--C--"]
    assert features["has_deletion"][0].tolist() == [[False] * 5, *[[False, False, True, False, False]] * 2]


def test_max_rows_of_the_joined_alignment():
    msa = alignment(("", "M"), ("", "A"), ("", "C"))
    features = protein_features("M:G", [msa, None], max_rows=2)
    assert letters(features["msa"][0]) == ["MG", "A-"]
    assert features["deletion_mean"][0].tolist() == features["deletion_value"][0].mean(axis=0).tolist()
    with pytest.raises(UserError, match="max_rows must be an integer"):
        protein_features("M", max_rows=0)


def test_one_alignment_for_each_chain():
    with pytest.raises(UserError, match="one entry for each chain, expected 2, got 1"):
        protein_features("M:G", [None])


# Batches


def test_pad_features():
    small = protein_features("GX:A")
    large = protein_features("WWWWY", [alignment(("", "WWWWY"), ("", "A----"))])
    batch = pad_features([small, large])
    assert batch.keys() == FEATURES.keys()
    assert batch["ref_pos"].shape == (2, 96, 3) and batch["msa"].shape == (2, 2, 5)
    for row, protein in enumerate((small, large)):
        for name, array in protein.items():
            padded = np.array(batch[name][row])
            kept = tuple(slice(length) for length in array.shape[1:])
            np.testing.assert_array_equal(padded[kept], array[0], err_msg=name)
            padded[kept] = 0
            assert not padded.any(), name
    kinds = {name: {mx.int32: "i", mx.float32: "f", mx.bool_: "b"}[array.dtype] for name, array in batch.items()}
    assert {name for name, kind in kinds.items() if kind == "b"} == {
        *("attention_mask", "atom_attention_mask", "msa_attention_mask", "has_deletion")
    }


def test_atoms_are_padded_to_a_multiple_of_32():
    features = {
        name: array[:, :40] if FEATURES[name].axes[0] == "A" else array
        for name, array in protein_features("WWW").items()
    }
    features["distogram_atom_idx"] = features["distogram_atom_idx"].clip(0, 39)
    assert pad_features([features])["ref_pos"].shape == (1, 64, 3)


def test_padded_rows_of_an_alignment_without_mask_do_not_count():
    one, two = protein_features("MK"), protein_features("MK", [alignment(("", "MK"), ("", "-K"))])
    del one["msa_attention_mask"], two["msa_attention_mask"]
    batch = pad_features([one, two])
    assert batch["msa_attention_mask"].tolist() == [[[True, True], [False, False]], [[True, True], [True, True]]]


def test_batches_of_batches():
    batch = pad_features([protein_features("MK"), protein_features("GGG")])
    again = pad_features([batch, protein_features("A")])
    expected = pad_features([protein_features(sequence) for sequence in ("MK", "GGG", "A")])
    for name, array in expected.items():
        assert mx.array_equal(again[name], array), name


def test_proteins_of_a_batch_have_the_same_features():
    other = protein_features("MK")
    del other["input_ids"]
    with pytest.raises(UserError, match="input_ids is missing in protein 2 of the batch"):
        pad_features([protein_features("MK"), other])
    with pytest.raises(UserError, match="at least one protein"):
        pad_features([])


# Checks


@pytest.mark.parametrize(
    "convert", [np.asarray, torch.tensor, mx.array, np.ndarray.tolist], ids=["NumPy", "torch", "MLX", "list"]
)
def test_checked_features(convert):
    """The same arrays come out of NumPy, torch, MLX and lists, with masks of bools or integers."""
    features = protein_features("MKW:G")
    given = {name: convert(array) for name, array in features.items()}
    given["attention_mask"] = convert(features["attention_mask"].astype(np.int64))
    given["has_deletion"] = convert(features["has_deletion"].astype(np.float32))
    checked = check_features(given)
    for name, array in features.items():
        assert checked[name].dtype == FEATURES[name].kind, name
        np.testing.assert_array_equal(np.array(checked[name]), array, err_msg=name)
    assert all(mx.array_equal(array, checked[name]) for name, array in check_features(checked).items())


def test_optional_features_may_be_missing_or_none():
    features = protein_features("MK")
    optional = {
        *("input_ids", "token_bonds", "msa", "msa_attention_mask", "has_deletion", "deletion_value", "deletion_mean")
    }
    some = {name: None if name in optional else array for name, array in features.items()}
    assert check_features(some).keys() == FEATURES.keys() - optional
    required = {name: array for name, array in features.items() if name not in optional}
    assert check_features(required).keys() == required.keys()
    for name in required:
        with pytest.raises(UserError, match=f"Features are missing: {name}. "):
            check_features({other: array for other, array in features.items() if other != name})


def changed(name, change):
    """Return features of two proteins of 4 and 2 tokens of which `change` returns another array."""
    features = pad_features([protein_features("MKWG"), protein_features("GA")])
    array = np.array(features[name])
    result = change(array)
    return {**features, name: array if result is None else result}


def assign(index, value):
    """Return a change of one value."""

    def change(array):
        array[index] = value

    return change


def as_floats(array):
    return array.astype(np.float32)


def without_batch(array):
    return array[0]


@pytest.mark.parametrize("name", FEATURES)
def test_shapes_must_agree(name):
    for change in (without_batch, lambda array: array[:, :-1] if array.shape[1] > 1 else array[:, :0]):
        with pytest.raises(UserError, match=rf"\b{name}\b|must have shape"):
            check_features(changed(name, change))
    if name not in ("attention_mask", "atom_attention_mask", "msa"):  # these determine the shapes of the others
        with pytest.raises(UserError, match=rf"^{name} must have shape \(2, .*\) \(\[batch, .*\]\), got"):
            check_features(changed(name, without_batch))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("res_type", assign((0, 1), 33), "res_type must be from 0 to 32, got 33"),
        ("res_type", assign((1, 0), -1), "res_type must be from 0 to 32, got -1"),
        ("res_type", as_floats, "res_type must be integers, got mlx.core.float32"),
        ("msa", assign((0, 0, 0), 33), "msa must be from 0 to 32, got 33"),
        ("input_ids", assign((0, 0), 64), "input_ids must be from 0 to 63, got 64"),
        ("mol_type", assign((0, 0), 4), "mol_type must be from 0 to 3, got 4"),
        ("asym_id", assign((0, 0), 4), "asym_id must be from 0 to 3, got 4"),
        ("ref_element", assign((0, 0), 128), "ref_element must be from 0 to 127, got 128"),
        ("ref_atom_name_chars", assign((0, 0, 0), 64), "ref_atom_name_chars must be from 0 to 63, got 64"),
        ("atom_to_token", assign((0, 0), 4), "atom_to_token must be from 0 to 3, got 4"),
        ("atom_to_token", assign((1, 3), 2), "atom_to_token must not refer to padding"),
        ("atom_to_token", assign((0, 1), 1), "atom_to_token must keep the atoms of a token together"),
        ("distogram_atom_idx", assign((0, 0), 64), "distogram_atom_idx must be from 0 to 63, got 64"),
        ("distogram_atom_idx", assign((1, 0), 40), "distogram_atom_idx must not refer to padding"),
        ("residue_index", lambda array: array.astype(np.int64) + 2**40, "residue_index must be from -2147483648 to"),
        ("ref_pos", assign((0, 0, 0), np.nan), "ref_pos must be finite, got nan"),
        ("ref_charge", assign((0, 0), np.inf), "ref_charge must be finite, got inf"),
        ("attention_mask", lambda array: array.astype(int) * 2, "attention_mask must be True or False .*, got 2"),
        ("has_deletion", lambda array: array + 0.5, "has_deletion must be True or False .*, got 0.5"),
        ("attention_mask", assign((0, 1), False), "^attention_mask must have padding on the right only"),
        ("attention_mask", assign((0, 0), False), "^attention_mask must start with True"),
        ("attention_mask", assign((0,), False), "^attention_mask must start with True"),
        ("atom_attention_mask", assign((0, 1), False), "^atom_attention_mask must have padding on the right only"),
        ("atom_attention_mask", assign((1,), False), "^atom_attention_mask must start with True"),
        ("attention_mask", lambda array: array[:0], r"attention_mask must have shape \[batch, tokens\], at least one"),
        ("attention_mask", lambda array: array[:, :0], r"attention_mask must have .*, got \(2, 0\)"),
        ("atom_attention_mask", lambda array: array[:, :0], r"atom_attention_mask must have .*, got \(2, 0\)"),
        ("msa", lambda array: array[:, :0], "msa must have at least one row"),
        ("residue_index", assign((0, 0), -5), None),  # as in some PDB files
        ("msa_attention_mask", assign((0, 0, 1), False), None),  # masked columns
    ],
)
def test_values(name, change, message):
    features = changed(name, change)
    if message is None:
        assert mx.array_equal(check_features(features)[name], mx.array(features[name]))
        return
    with pytest.raises(UserError, match=message):
        check_features(features)


def test_names_are_checked():
    features = protein_features("MK")
    with pytest.raises(TypeError, match="'deletion_means' is not a feature of ESMFold2. Did you mean deletion_mean?"):
        check_features({**features, "deletion_means": features["deletion_mean"]})
    with pytest.raises(UserError, match="have msa_attention_mask but no msa"):
        check_features({**features, "msa": None})


def test_a_ligand_and_a_modified_residue():
    """One token for each atom: two of residue 1 of the chain, and two of a ligand."""
    features = protein_features("GGGGG")
    features["mol_type"][0, 3:] = 3
    features["residue_index"][0] = [0, 1, 1, 0, 0]
    features["asym_id"][0] = [0, 0, 0, 1, 1]
    features["atom_to_token"][0, :8] = [0, 0, 0, 0, 1, 2, 3, 4]
    features["atom_attention_mask"][0, 8:] = False
    features["distogram_atom_idx"][0] = [1, 4, 5, 6, 7]
    features["token_bonds"][0, 3, 4] = features["token_bonds"][0, 4, 3] = 1
    checked = check_features(features)
    assert checked["token_bonds"].sum().item() == 2 and checked["mol_type"].tolist() == [[0, 0, 0, 3, 3]]
