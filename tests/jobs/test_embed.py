import json

import numpy as np
import pytest
import torch

from mlx_esm_hf import MLXAutoModel, MLXEsmForMaskedLM, embed, load_protein_model
from tests.jobs.models import UBIQUITIN, fair_esm_pair, fair_esm_tokens, write_model
from tests.runs.results import read

SEQUENCES = [UBIQUITIN, "MKT", "GG", UBIQUITIN[:40], "ACDEFGHIKLMNPQRSTVWY"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("esm2"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load_protein_model(MLXAutoModel, str(folder))


@pytest.mark.parametrize("family", ["ESM-1", "ESM-1b", "ESM-2"])
def test_all_layers_match_fair_esm(family):
    model, alphabet, ours = fair_esm_pair(family)
    ours = type(ours)(ours.network.esm, ours.tokenizer)
    layers = list(range(model.num_layers + 1))
    found = embed(SEQUENCES, ours, layers=layers, pooling=["mean", "cls", "residues"])
    for sequence, result in zip(SEQUENCES, found, strict=True):
        with torch.no_grad():
            theirs = model(fair_esm_tokens(alphabet, sequence), repr_layers=layers)["representations"]
        for layer in layers:
            states = theirs[layer][0].float().numpy()
            residues = states[1 : len(sequence) + 1]
            scale = np.abs(states).max()
            arrays = result.arrays
            np.testing.assert_allclose(arrays[f"residues.{layer}"], residues, atol=1e-5 * scale)
            np.testing.assert_allclose(arrays[f"mean.{layer}"], residues.mean(0), atol=1e-5 * scale)
            np.testing.assert_allclose(arrays[f"cls.{layer}"], states[0], atol=1e-5 * scale)


def test_results_are_short_and_show_progress(loaded, tmp_path, capsys):
    steps = []
    results = list(embed(["MKTAYIAKQR", "MKT"], loaded, pooling=["mean", "residues"], progress=steps.append))
    assert repr(results[0]) == (
        "Result(number=0, id='1', length=10, arrays={'mean': float32[32], 'residues': float32[10, 32]})"
    )
    assert [step.residues_done for step in steps if not step.phase] == [10, 3]
    (tmp_path / "p.fasta").write_text(">a\nMKTAYIAKQR\n>b\nMKT\n")
    assert capsys.readouterr().err == ""
    for output in (None, tmp_path / "o.npz"):
        done = embed(tmp_path / "p.fasta", loaded, output, progress=True)
        assert output is not None or len(list(done)) == 2
        shown = capsys.readouterr().err
        assert "100%" in shown and "13.0/13.0" in shown
    list(embed(["MKT"], loaded, progress=False))
    assert capsys.readouterr().err == ""


def test_poolings_agree_with_each_other(loaded):
    for result in embed(SEQUENCES, loaded, pooling=["mean", "max", "residues"]):
        residues = result.arrays["residues"]
        assert residues.shape == (result.length, 32)
        np.testing.assert_allclose(result.arrays["mean"], residues.mean(0), atol=1e-6)
        np.testing.assert_array_equal(result.arrays["max"], residues.max(0))


def test_repeated_unknown_letters_keep_their_positions(loaded):
    (result,) = embed(["MKJJJV"], loaded, pooling=["residues"])
    (expected,) = embed(["MKXXXV"], loaded, pooling=["residues"])
    assert result.length == 6
    np.testing.assert_array_equal(result.arrays["residues"], expected.arrays["residues"])


def test_negative_layers(loaded):
    (a,) = embed(["MKTAYI"], loaded, layers=[-1, 0, -4])
    assert list(a.arrays) == ["mean.3", "mean.0"]
    with pytest.raises(ValueError, match="Layer 4 not found. The model has the layers 0 to 3"):
        embed(["MKT"], loaded, layers=[4])


@pytest.mark.parametrize("suffix", ["", ".csv", ".safetensors", ".npz", ".h5", ".parquet"])
@pytest.mark.parametrize("pooling", [["mean"], ["mean", "residues"]], ids=["vectors", "residues"])
def test_all_formats_contain_the_same_arrays(folder, tmp_path, suffix, pooling):
    if suffix == ".csv":
        pooling = [name for name in pooling if name != "residues"]
    records = list(zip(["sp|P12345|ONE", "two", "two", "a/b", "five"], SEQUENCES, strict=True))
    expected = list(embed(records, str(folder), pooling=pooling))
    output = tmp_path / f"out{suffix}"
    embed(records, str(folder), output, pooling=pooling)
    found = read(output)
    assert list(found) == [result.id for result in expected] == ["sp|P12345|ONE", "two", "two#2", "a/b", "five"]
    for ours, theirs in zip(found.values(), expected, strict=True):
        assert ours.keys() == theirs.arrays.keys()
        for kind, array in theirs.arrays.items():
            np.testing.assert_array_equal(ours[kind], array)
    assert sorted(p.name for p in tmp_path.iterdir()) == [output.name]
    if suffix != ".csv":
        assert {"model", "dtype", "layers", "pooling"} <= metadata(output).keys()


def metadata(path):
    """Return the metadata of an output."""
    if path.suffix == "":
        return json.loads((path / "manifest.json").read_text())["settings"]
    if path.suffix == ".npz":
        return json.loads(str(np.load(path)["metadata"]))
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        return safe_open(path, framework="numpy").metadata()
    if path.suffix == ".h5":
        import h5py

        return dict(h5py.File(path).attrs)
    import pyarrow.parquet

    return {key.decode(): value for key, value in pyarrow.parquet.read_schema(path).metadata.items()}


def test_loading_options_are_refused_for_a_loaded_model(loaded):
    with pytest.raises(TypeError, match="poolng, long"):
        embed(["MKT"], loaded, poolng=["cls"], long="nonsense")


def test_windows_do_not_change_short_proteins(tmp_path):
    folder = str(write_model(tmp_path, "ESM-1b", positions=84))  # 80 residues
    plain = list(embed(SEQUENCES, folder, pooling=["mean", "residues"]))
    windowed = list(embed(SEQUENCES, folder, pooling=["mean", "residues"], long="window"))
    for a, b in zip(plain, windowed, strict=True):
        np.testing.assert_array_equal(a.arrays["residues"], b.arrays["residues"])


def test_long_proteins(tmp_path):
    folder = str(write_model(tmp_path, "ESM-1b", positions=34))  # 30 residues
    with pytest.raises(ValueError, match="'1' has 76 residues; .* accepts at most 30"):
        list(embed([UBIQUITIN], folder))
    (cut,) = embed([UBIQUITIN], folder, long="truncate", pooling=["residues"])
    (plain,) = embed([UBIQUITIN[:30]], folder, pooling=["residues"])
    np.testing.assert_array_equal(cut.arrays["residues"], plain.arrays["residues"])
    (windowed,) = embed([UBIQUITIN], folder, long="window", pooling=["residues", "mean"])
    assert windowed.arrays["residues"].shape == (76, 32)
    # Near the ends only one window has a say.
    np.testing.assert_allclose(windowed.arrays["residues"][:5], plain.arrays["residues"][:5], atol=1e-5)
    (end,) = embed([UBIQUITIN[-30:]], folder, pooling=["residues"])
    np.testing.assert_allclose(windowed.arrays["residues"][-5:], end.arrays["residues"][-5:], atol=1e-5)


def test_all_long_proteins_of_a_file_are_named_before_any_work(tmp_path):
    folder = str(write_model(tmp_path / "model", "ESM-1b", positions=34))
    fasta = tmp_path / "p.fasta"
    fasta.write_text(f">a\nMKT\n>b\n{UBIQUITIN}\n>c\n{UBIQUITIN}\n")
    with pytest.raises(ValueError, match="(?s)nothing was computed.*line 3: 'b' has 76.*line 5: 'c' has 76"):
        embed(fasta, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_batch_size_does_not_change_results(folder):
    one = list(embed(SEQUENCES, str(folder), batch_tokens=1))
    all_at_once = list(embed(SEQUENCES, str(folder), batch_tokens=10000))
    for a, b in zip(one, all_at_once, strict=True):
        assert a.id == b.id
        np.testing.assert_allclose(a.arrays["mean"], b.arrays["mean"], atol=1e-5)


def test_half_precision_gives_float32(folder):
    (result,) = embed(["MKTAYI"], str(folder), dtype="bfloat16")
    assert result.arrays["mean"].dtype == np.float32


def test_base_model_of_a_masked_lm_gives_the_same_embeddings(folder, loaded):
    network = MLXEsmForMaskedLM.from_pretrained(folder).eval()
    (a,) = embed(["MKT"], type(loaded)(network.esm, loaded.tokenizer))
    (b,) = embed(["MKT"], loaded)
    np.testing.assert_array_equal(a.arrays["mean"], b.arrays["mean"])
