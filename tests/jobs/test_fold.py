import csv
import json
import random
import re

import gemmi
import mlx.core as mx
import numpy as np
import pytest

from mlx_esm_hf import MLXEsmConfig, MLXEsmFold2Config, MLXEsmFold2Model, MLXEsmForProteinFolding, fold
from mlx_esm_hf.jobs import structures
from mlx_esm_hf.jobs.folding import ESMFold
from mlx_esm_hf.jobs.folding2 import ESMFold2
from mlx_esm_hf.models.esmfold.residue_constants import ATOM37_MASK
from mlx_esm_hf.runs.job import Item
from mlx_esm_hf.runtime import memory
from tests.jobs.models import UBIQUITIN, write_folding_model
from tests.tiny import tiny_folding, tiny_folding2

PROTEINS = [("sp|P12345|ONE", UBIQUITIN[:40]), ("two", "MKXTAYI:GG:MKTAYIAKQR"), ("three", "ACDEFGHIKLMNPQRSTVWY")]
ENDINGS = (".cif", ".npz", ".pdb", "_pae.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folding_model(tmp_path_factory.mktemp("fold"))


@pytest.fixture(scope="module")
def network(folder):
    return MLXEsmForProteinFolding.from_pretrained(folder)


def write_fasta(path, proteins):
    path.write_text("".join(f">{id}\n{sequence}\n" for id, sequence in proteins))
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def table(folder):
    with open(folder / "index.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("batch_tokens", [None, 50], ids=["together", "alone"])
def test_results_match_the_model(network, batch_tokens):
    """Batched and alone, with and without chains. Linkers and padding are not in the results."""
    proteins, reported = [("one", UBIQUITIN[:68]), PROTEINS[1], ("three", UBIQUITIN[10:])], []
    found = list(fold(proteins, network, num_recycles=1, batch_tokens=batch_tokens, progress=reported.append))
    reported = [progress for progress in reported if "pass" in progress.doing]
    assert len(reported) == (2 if batch_tokens is None else 6)
    assert [result.id for result in found] == [id for id, _ in proteins]
    for (_, sequence), result in zip(proteins, found, strict=True):
        output = network.infer(sequence, num_recycles=1)
        arrays, letters = result.arrays, sequence.replace(":", "")
        chains = np.repeat(np.arange(sequence.count(":") + 1), list(map(len, sequence.split(":"))))
        places = np.arange(len(letters)) + 25 * chains
        assert result.length == len(letters)
        np.testing.assert_array_equal(arrays["chain_index"], chains)
        np.testing.assert_array_equal(arrays["aatype"], np.array(output.aatype)[0, places])
        exists = np.array(output.atom37_atom_exists)[0]
        np.testing.assert_array_equal(exists[places], ATOM37_MASK[arrays["aatype"]])
        assert exists.sum() == exists[places].sum()  # all atoms that there are
        atoms = np.take_along_axis(
            np.array(output.positions)[-1, 0], np.array(output.residx_atom37_to_atom14)[0][..., None], axis=1
        )
        np.testing.assert_allclose(arrays["positions"], (atoms * exists[..., None])[places], atol=1e-3)
        np.testing.assert_allclose(arrays["plddt"], 100 * np.array(output.plddt)[0, places], atol=1e-2)
        error = np.array(output.predicted_aligned_error)[0]
        np.testing.assert_allclose(arrays["predicted_aligned_error"], error[np.ix_(places, places)], atol=1e-3)
        np.testing.assert_allclose(arrays["ptm"], output.ptm, atol=1e-4)
        np.testing.assert_allclose(arrays["mean_plddt"], 100 * np.array(output.mean_plddt), atol=1e-2)
        assert arrays["recycles"] == [1] and arrays["seconds"] > 0


def test_folder_output(folder, tmp_path):
    fold(PROTEINS, str(folder), tmp_path / "out")
    names = {f"{name}{ending}" for name in ("P12345", "two", "three") for ending in ENDINGS}
    of_the_run = {"index.csv", "manifest.json", "checksums.txt", "shard-00000000.safetensors"}
    assert contents(tmp_path / "out").keys() == names | of_the_run
    rows, results = table(tmp_path / "out"), list(fold(PROTEINS, str(folder)))
    assert list(rows[0]) == ["number", "id", "length", "shard", "files", *SAID]
    for (id, sequence), row, result in zip(PROTEINS, rows, results, strict=True):
        assert (row["id"], row["chains"], row["recycles"]) == (id, str(sequence.count(":") + 1), "2")
        assert row["length"] == str(len(sequence.replace(":", "")))
        assert float(row["mean_plddt"]) == pytest.approx(result.arrays["mean_plddt"][0], abs=0.006)
        assert float(row["ptm"]) == pytest.approx(result.arrays["ptm"][0], abs=0.001)
        assert float(row["seconds"]) > 0
        text = (tmp_path / "out" / f"{row['files']}.pdb").read_bytes()
        assert text == structures.pdb(result)
        block = gemmi.cif.read(str(tmp_path / "out" / f"{row['files']}.cif")).sole_block()
        assert block.name == row["files"]


SAID = ["chains", "mean_plddt", "ptm", "recycles", "seconds"]


@pytest.mark.parametrize(("formats", "left"), [(["cif"], ".pdb"), (["pdb"], ".cif")])
def test_one_format_and_pictures(network, tmp_path, formats, left):
    fold(["MKTAYI"], network, tmp_path / "out", formats=formats, pictures=True)
    files = {f"1{ending}" for ending in (*ENDINGS, "_plddt.png", "_pae.png") if ending != left}
    assert files == {name for name in contents(tmp_path / "out") if name.startswith("1")}


@pytest.mark.parametrize("suffix", [".pdb", ".cif"])
def test_single_file_output(network, tmp_path, suffix):
    output = tmp_path / f"out{suffix}"
    fold(["MKTAYI:GGA"], network, output)
    (result,) = fold(["MKTAYI:GGA"], network)
    assert contents(tmp_path) == {output.name: {".pdb": structures.pdb, ".cif": structures.mmcif}[suffix](result)}


@pytest.mark.parametrize("source", ["file", "Python"])
def test_single_file_needs_exactly_one_protein(network, tmp_path, source):
    proteins = PROTEINS if source == "Python" else write_fasta(tmp_path / "p.fasta", PROTEINS)
    with pytest.raises(ValueError, match="contains one structure, but there are several proteins"):
        fold(proteins, network, tmp_path / "out.pdb")
    assert not (tmp_path / "out.pdb").exists()


def test_file_names(network, tmp_path):
    """Unsafe, repeated, and differing only in case."""
    ids = ["a/b", "../../up", "P1", "p1", "P1", ".hidden", "é$x$", "x" * 300, "x" * 299, "a b"]
    fold([(id, "MKTAYI") for id in ids], network, tmp_path / "out", formats=["pdb"], num_recycles=0)
    rows = table(tmp_path / "out")
    ids[4] = "P1#2"
    assert [row["id"] for row in rows] == ids
    names = [row["files"] for row in rows]
    assert names[:8] == ["a_b", "_.._.._up", "P1", "p1_2", "P1_2_2", "_.hidden", "___x_", "x" * 150]
    assert len({name.casefold() for name in names}) == len(names)
    for name in names:
        assert (tmp_path / "out" / f"{name}.pdb").exists()
    assert not (tmp_path / "up.pdb").exists() and len(list(tmp_path.iterdir())) == 1


def test_protein_that_cannot_be_folded_is_left_out(network, tmp_path):
    bad = {
        "masked": ("MK<mask>T", "has <mask>, but only residues can be folded"),
        "empty_chain": ("MKT:", "is empty, in chain 2"),
        "digit": ("MK:M3K", "has '3' at position 2, which is not a residue, in chain 2"),
        "unknown": ("XXBX:UX", "has none of the 20 standard residues, and other residues have no atoms"),
    }
    proteins = [PROTEINS[0], *((id, sequence) for id, (sequence, _) in bad.items()), PROTEINS[2]]
    report = fold(write_fasta(tmp_path / "p.fasta", proteins), network, tmp_path / "out")
    assert [row["id"] for row in table(tmp_path / "out")] == [PROTEINS[0][0], PROTEINS[2][0]]
    for said, (id, (_, message)) in zip(report.left_out, bad.items(), strict=True):
        assert said.endswith(f"{id!r} {message}.")
    with pytest.raises(ValueError, match="'masked' has <mask>"):
        fold(proteins, network, tmp_path / "strict", strict=True)


def test_protein_too_large_for_pdb_is_left_out(network, tmp_path):
    many = ":".join("G" * 63)
    proteins = [("many", many), ("few", "MKTAYI")]
    report = fold(proteins, network, tmp_path / "both", num_recycles=0)
    assert [row["id"] for row in table(tmp_path / "both")] == ["few"]
    assert re.search("'many' has 63 chains, but a PDB file has at most 62: use mmCIF", report.left_out[0])


@pytest.fixture
def room(network, monkeypatch):
    """Limit free memory to what folding a number of residues needs."""

    def set_room(residues):
        needed = ESMFold(network, {"num_recycles": 0}).bytes_needed(residues)
        monkeypatch.setattr(memory, "free_memory", lambda: needed + (1 << 20))

    return set_room


def test_protein_too_large_for_memory_is_left_out(network, room, tmp_path):
    room(500)
    proteins = [("a", "MKTAYI"), ("long", "MKTAYIAKQR" * 60), ("linked", ":".join(["GG"] * 30)), ("b", "MKTAY:GG")]
    report = fold(write_fasta(tmp_path / "p.fasta", proteins), network, tmp_path / "out", batch_tokens=10_000)
    assert [row["id"] for row in table(tmp_path / "out")] == ["a", "b"]
    assert re.search(r"line 3: 'long' has 600 residues, which need .* GB of memory", report.left_out[0])
    assert re.search(r"line 5: 'linked' has 60 residues, which need", report.left_out[1])  # 785 with linkers
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert 500 <= settings["batch_tokens"] < 600  # more would not fit together, either


@pytest.mark.parametrize("options", [{}, {"batch_tokens": 1000}], ids=["by itself", "as asked"])
def test_resumed_run_keeps_its_batch_size(network, room, tmp_path, options):
    fasta = write_fasta(tmp_path / "p.fasta", PROTEINS)
    room(100)
    fold(fasta, network, tmp_path / "out", **options)
    before = contents(tmp_path / "out")
    settings = json.loads(before["manifest.json"])["settings"]
    assert 100 <= settings["batch_tokens"] < 200
    room(700)
    (tmp_path / "out" / "shard-00000000.safetensors").unlink()
    fold(fasta, network, tmp_path / "out", **options)
    assert same_but_seconds(contents(tmp_path / "out"), before)


def same_but_seconds(found, expected):
    """Return whether all files are the same, except those that contain the seconds of the computation."""
    varies = {name for name in expected if name.startswith("shard-")} | {"index.csv", "checksums.txt"}
    return found.keys() == expected.keys() and all(found[name] == expected[name] for name in expected.keys() - varies)


def test_damaged_file_is_remade_from_its_shard(network, tmp_path, monkeypatch):
    """Without folding again."""
    fasta = write_fasta(tmp_path / "p.fasta", PROTEINS)
    fold(fasta, network, tmp_path / "out", pictures=True)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "two.cif").unlink()
    (tmp_path / "out" / "three_pae.png").write_bytes(b"")
    monkeypatch.setattr(MLXEsmForProteinFolding, "infer", None)
    fold(fasta, network, tmp_path / "out", pictures=True)
    assert contents(tmp_path / "out") == before


def test_run_with_other_recycles_is_refused(network, tmp_path):
    fasta = write_fasta(tmp_path / "p.fasta", PROTEINS[2:])
    fold(fasta, network, tmp_path / "out", num_recycles=0)
    with pytest.raises(ValueError, match="num_recycles: 0; now: 1"):
        fold(fasta, network, tmp_path / "out", num_recycles=1)


def test_chunks_have_similar_work(network, tmp_path):
    """A kill loses at most the work of one protein of `batch_tokens` residues."""
    draw = random.Random(0)
    proteins = [(f"p{i}", "".join(draw.choices("ACDEFGHIKLMNPQRSTVWY", k=10 + 3 * i))) for i in range(10)]
    fold(proteins, network, tmp_path / "out", batch_tokens=40, num_recycles=0)
    shards = {}
    for row in table(tmp_path / "out"):
        shards.setdefault(row["shard"], []).append(int(row["length"]))
    assert list(shards.values()) == [[10, 13, 16, 19, 22], [25, 28], [31], [34], [37]]


def test_short_proteins_are_not_folded_with_long_ones(network):
    """Proteins of similar length are folded together."""
    reported: list = []
    proteins = [("long", 2 * UBIQUITIN), ("a", "MKTAYI"), ("b", "GG")]
    list(fold(proteins, network, num_recycles=0, batch_tokens=1000, progress=reported.append))
    assert [progress.doing for progress in reported if "pass" in progress.doing] == [
        "long (152 residues), pass 1 of 1",
        "a (6 residues) and 1 more, pass 1 of 1",
    ]


def test_each_pass_is_reported(network):
    reported = []
    proteins = [("long", UBIQUITIN), ("a", "MKTAYI"), ("b", "GG")]
    list(fold(proteins, network, num_recycles=1, batch_tokens=80, progress=reported.append))
    assert [progress.doing for progress in reported if "pass" in progress.doing] == [
        "long (76 residues), pass 1 of 2",
        "long (76 residues), pass 2 of 2",
        "a (6 residues) and 1 more, pass 1 of 2",
        "a (6 residues) and 1 more, pass 2 of 2",
    ]
    assert network.trunk.on_pass is None


def test_dtypes(folder, network):
    (exact,) = fold(["MKTAYIAKQR"], network, num_recycles=0)
    (rounded,) = fold(["MKTAYIAKQR"], str(folder), num_recycles=0, dtype="bfloat16")
    assert {array.dtype for array in rounded.arrays.values()} == {np.dtype("float32"), np.dtype("int32")}
    difference = np.abs(exact.arrays["plddt"] - rounded.arrays["plddt"])
    assert 0 < difference.max() < 10
    with pytest.raises(ValueError, match="The folding trunk cannot be float16"):
        fold(["MKTAYI"], str(folder), dtype="float16")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"formats": ["cif", "xyz"]}, ValueError, "formats must be any of pdb, cif, got xyz"),
        ({"num_recycles": -1}, ValueError, "num_recycles must be an integer from 0 to 1000, got -1"),
        ({"batch_tokens": 0}, ValueError, "batch_tokens must be an integer from 1 to 2147483647, got 0"),
        ({"dtype": "float32"}, TypeError, "dtype: options for loading a model"),
        ({"pictures": True, "output": None}, ValueError, "Pictures are written into a folder"),
    ],
)
def test_invalid_options_are_refused(network, tmp_path, options, error, message):
    arguments = {"output": tmp_path / "out"} | options
    with pytest.raises(error, match=message):
        fold(["MKTAYI"], network, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_missing_library_is_reported(network, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "modelcif" else name)
    for output in ("out", "out.cif"):
        with pytest.raises(ValueError, match=r"cif needs modelcif: pip install 'mlx-esm-hf\[fold\]'"):
            fold(["MKTAYI"], network, tmp_path / output)
    fold(["MKTAYI"], network, tmp_path / "out.pdb")


def test_memory_estimate_is_an_upper_bound():
    """Compare the memory that folding takes, with pair states of the published width, with the estimate.

    It never exceeds the estimate and is a good part of it, for one protein and for a batch of as many tokens.
    """
    fields = tiny_folding()
    fields["esmfold_config"]["trunk"] |= {"pairwise_state_dim": 128, "pairwise_head_width": 32, "num_blocks": 1}
    model = ESMFold(MLXEsmForProteinFolding(MLXEsmConfig(**fields)).eval(), {"num_recycles": 0})

    def fold_together(sequences):
        items = [Item(0, "P1", model.encode(sequence), len(sequence), 1, 1) for sequence in sequences]
        model.predict(items, lambda step: None)

    fold_together(["MKTAYI"])
    for proteins, part in (([UBIQUITIN * 3], 5), ([UBIQUITIN] * 3, 15)):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        fold_together(proteins)
        taken, foreseen = mx.get_peak_memory() - before, model.bytes_needed(3 * len(UBIQUITIN))
        assert foreseen / part < taken < foreseen


def test_a_result_of_nan_is_an_error_that_names_the_parameter(folder, tmp_path):
    network = MLXEsmForProteinFolding.from_pretrained(folder)
    norm = network.trunk.structure_module.ipa.linear_out
    norm.bias = mx.full(norm.bias.shape, np.nan)
    with pytest.raises(ValueError, match="'P1' is NaN or infinite. Damaged parameters: trunk.structure_module.ipa"):
        fold([("P1", "MKTAYI")], network, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.pdb"))


def test_a_chain_of_unknown_residues_blocks_no_protein(folder, tmp_path):
    done = fold(
        [("a", "MKT:XX"), ("b", "X:M"), ("c", "XXX"), ("d", "MK")], str(folder), tmp_path / "out", num_recycles=0
    )
    assert {path.stem for path in (tmp_path / "out").glob("*.cif")} == {"a", "b", "d"}
    assert "'c' has none of the 20 standard residues" in done.left_out[0]


def test_memory_estimate_of_esmfold2_is_an_upper_bound():
    """Compare the memory that folding takes, with pair states of the published width, with the estimate."""
    fields = tiny_folding2(pairwise_hidden_size=256, pair_transition_intermediate_size=1024)
    fields["folding_trunk_num_hidden_layers"] = 1
    choices = dict.fromkeys(ESMFold2.own_choices) | {"num_loops": 0, "num_steps": 1, "num_samples": 2}
    model = ESMFold2(MLXEsmFold2Model(MLXEsmFold2Config(**fields)).eval(), choices)

    def fold_one(sequence):
        item = Item(0, "P1", model.encode(sequence), len(sequence), 1, 1)
        model.predict([item], lambda step: None)

    fold_one("MKTAYI")
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    fold_one(UBIQUITIN * 2)
    taken, foreseen = mx.get_peak_memory() - before, model.bytes_needed(2 * len(UBIQUITIN))
    assert foreseen / 3 < taken < foreseen
