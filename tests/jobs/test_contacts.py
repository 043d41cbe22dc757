import csv
import os
import subprocess
import sys
from pathlib import Path

import mlx.nn as nn
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mlx_esm_hf import MLXAutoModel, contacts, load_protein_model
from mlx_esm_hf.cli import app
from mlx_esm_hf.jobs.contacts import bytes_needed, known_contacts, precision, top_contacts
from mlx_esm_hf.ops import kernels
from mlx_esm_hf.runtime import memory
from tests.jobs.models import UBIQUITIN, fair_esm_pair, fair_esm_tokens, write_model
from tests.marks import needs_cpu
from tests.vocabulary import write_vocabulary

SEQUENCES = [UBIQUITIN, "MKTAYIAKQR", UBIQUITIN[:40]]


@pytest.mark.parametrize("family", ["ESM-1", "ESM-1b", "ESM-2"])
def test_maps_match_fair_esm(family):
    model, alphabet, ours = fair_esm_pair(family)
    loaded = type(ours)(ours.network.esm, ours.tokenizer)
    for sequence, result in zip(SEQUENCES, contacts(SEQUENCES, loaded), strict=True):
        with torch.no_grad():
            theirs = model.predict_contacts(fair_esm_tokens(alphabet, sequence))[0].numpy()
        np.testing.assert_allclose(result.arrays["contacts"], theirs, atol=1e-5)


def write_pdb(path, sequence, first=100, missing=()):
    """Write a helix of Cβ atoms, Cα for glycine, numbered from `first`."""
    from Bio.SeqUtils import seq3

    coordinates = np.array([[2.3 * np.cos(1.75 * i), 2.3 * np.sin(1.75 * i), 1.5 * i] for i in range(len(sequence))])
    lines = []
    for i, (residue, (x, y, z)) in enumerate(zip(sequence, coordinates, strict=True)):
        if i not in missing:
            name = "CA" if residue == "G" else "CB"
            lines.append(
                f"ATOM  {i + 1:5d}  {name}  {seq3(residue).upper()} A{i + first:4d}    "
                f"{x:8.3f}{y:8.3f}{z:8.3f}  1.00  0.00           C"
            )
    path.write_text("\n".join([*lines, "END"]) + "\n")
    return coordinates


def test_known_contacts_of_a_structure(tmp_path):
    coordinates = write_pdb(tmp_path / "p.pdb", UBIQUITIN, missing=(3, 4))
    known = known_contacts(tmp_path / "p.pdb", UBIQUITIN)
    distances = np.linalg.norm(coordinates[:, None] - coordinates[None], axis=-1)
    there = np.setdiff1d(np.arange(len(UBIQUITIN)), [3, 4])
    np.testing.assert_array_equal(known[np.ix_(there, there)], distances[np.ix_(there, there)] < 8)
    assert np.isnan(known[3]).all() and np.isnan(known[:, 4]).all()
    masked = UBIQUITIN[:10] + "<mask>" + UBIQUITIN[11:]
    np.testing.assert_array_equal(known_contacts(tmp_path / "p.pdb", masked), known)
    with pytest.raises(ValueError, match="Chain 'B' not found in .* .chains: A."):
        known_contacts(tmp_path / "p.pdb", UBIQUITIN, "B")
    (tmp_path / "empty.pdb").write_text("nothing\n")
    with pytest.raises(ValueError, match="empty.pdb is not a PDB or mmCIF file"):
        known_contacts(tmp_path / "empty.pdb", UBIQUITIN)


def test_precision_of_the_most_probable_contacts():
    known = np.zeros((30, 30))
    known[0, 10] = known[10, 0] = known[2, 28] = known[28, 2] = 1
    probabilities = np.zeros((30, 30))
    probabilities[0, 10] = 0.9
    probabilities[1, 11] = 0.8
    probabilities[2, 28] = 0.7
    found = precision(probabilities, known, fraction=0.1)  # the first three
    assert found["all"] == pytest.approx(2 / 3)
    assert found["short"] == pytest.approx(1 / 3)
    assert found["long"] == pytest.approx(1 / 3)


def test_files(folder, tmp_path):
    fasta = tmp_path / "p.fasta"
    fasta.write_text(f">ubq\n{UBIQUITIN}\n")
    write_pdb(tmp_path / "p.pdb", UBIQUITIN)
    picture = tmp_path / "map.png"
    contacts(fasta, folder, tmp_path / "map.npz", top=tmp_path / "t.csv", picture=picture, structure=tmp_path / "p.pdb")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    (result,) = contacts([UBIQUITIN], folder)
    with np.load(tmp_path / "map.npz") as file:
        np.testing.assert_array_equal(file["ubq"], result.arrays["contacts"])
    contacts(fasta, folder, tmp_path / "top.csv")
    assert (tmp_path / "t.csv").read_bytes() == (tmp_path / "top.csv").read_bytes()
    rows = list(csv.DictReader((tmp_path / "top.csv").open()))
    assert len(rows) == len(UBIQUITIN)
    probabilities = [float(row["probability"]) for row in rows]
    assert probabilities == sorted(probabilities, reverse=True)
    assert all(int(row["j"]) - int(row["i"]) >= 6 for row in rows)
    i, j, p = top_contacts(result.arrays["contacts"])[0]
    assert result.arrays["contacts"][i - 1, j - 1] == np.float32(p)


def test_picture_needs_exactly_one_protein(folder, tmp_path):
    (tmp_path / "p.fasta").write_text(">a\nMKT\n>b\nMKT\n")
    with pytest.raises(ValueError, match="contains 2"):
        contacts(tmp_path / "p.fasta", folder, tmp_path / "o.npz", picture=tmp_path / "p.png")
    with pytest.raises(ValueError, match="map.foo"):
        contacts(tmp_path / "p.fasta", folder, tmp_path / "o.npz", picture=tmp_path / "map.foo")
    assert not (tmp_path / "o.npz").exists()


@needs_cpu
@pytest.mark.parametrize("native", [True, False], ids=["kernels", "plain"])
def test_short_proteins_are_not_padded_to_long_ones(native, folder, monkeypatch):
    """Attention maps include padding even if the kernels pack other batches."""
    if not native:
        monkeypatch.setattr(kernels, "native", None)
    model = load_protein_model(MLXAutoModel, folder)
    predict, shapes = model.network.predict_contacts, []

    def predict_contacts(input_ids, attention_mask):
        shapes.append(input_ids.shape)
        return predict(input_ids, attention_mask)

    monkeypatch.setattr(model.network, "predict_contacts", predict_contacts)
    list(contacts([(UBIQUITIN * 2)[:120], "MKTAYI" * 5, "MKTAYI" * 4, UBIQUITIN[:28]], model))
    assert shapes == [(1, 122), (3, 32)]


def test_windows(tmp_path):
    folder = str(write_model(tmp_path, "ESM-1b", positions=84))  # 80 residues
    (plain,) = contacts([UBIQUITIN], folder)
    (windowed,) = contacts([UBIQUITIN], folder, long="window")
    np.testing.assert_array_equal(plain.arrays["contacts"], windowed.arrays["contacts"])
    (long,) = contacts([UBIQUITIN * 2], folder, long="window")
    found = long.arrays["contacts"]
    assert found.shape == (152, 152) and found[0, 151] == 0 and found[0, 70] > 0
    np.testing.assert_allclose(found, found.T, rtol=1e-6)  # on a GPU the last bits differ


def test_model_without_contact_head_is_refused(folder):
    model = load_protein_model(MLXAutoModel, folder)
    model.network = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="has no contact head: a Linear does not predict contacts"):
        contacts(["MKT"], model)


def test_model_with_untrained_contact_head_is_refused(folder, tmp_path):
    from safetensors.numpy import load_file, save_file

    state = load_file(f"{folder}/model.safetensors")
    save_file(
        {k: v for k, v in state.items() if "contact_head" not in k}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    for name in ("config.json", "vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(Path(folder, name).read_bytes())
    with pytest.raises(ValueError, match="contact"):
        contacts(["MKT"], str(tmp_path))


@pytest.fixture
def room(folder, monkeypatch):
    """Limit free memory to what the contacts of a number of residues need."""
    model = load_protein_model(MLXAutoModel, folder)

    def set_room(residues):
        monkeypatch.setattr(memory, "free_memory", lambda: bytes_needed(model, residues) + (1 << 20))

    return set_room


def test_protein_too_large_for_memory_is_left_out_before_the_work(folder, room, tmp_path):
    fasta = tmp_path / "p.fasta"
    fasta.write_text(f">a\n{UBIQUITIN}\n>long\n{'MKTAYIAKQR' * 50}\n>b\n{UBIQUITIN[:40]}\n")
    room(100)
    report = contacts(fasta, folder, tmp_path / "out.npz")
    message = "line 3: 'long' has 500 residues, which need 0.04 GB of memory; 0.00 GB are free."
    assert len(report.left_out) == 1 and report.left_out[0].endswith(message)
    with np.load(tmp_path / "out.npz") as file:
        assert file.files == ["a", "b", "ids", "metadata"]
        assert "memory" not in str(file["metadata"])  # the numbers do not depend on it
    with pytest.warns(UserWarning, match="left out: .*'long' has 500 residues, which need"):
        assert [result.id for result in contacts(fasta, folder)] == ["a", "b"]
    with pytest.raises(ValueError, match="'long' has 500 residues, which need"):
        contacts(fasta, folder, tmp_path / "strict.npz", strict=True)


def test_resumed_run_keeps_its_memory_limit(folder, room, tmp_path, monkeypatch):
    """Otherwise the results after a long protein would be numbered differently."""

    def stop(*arguments):
        raise KeyboardInterrupt

    fasta = tmp_path / "p.fasta"
    fasta.write_text(f">a\n{UBIQUITIN}\n>long\n{'MKTAYIAKQR' * 50}\n>b\n{UBIQUITIN[:40]}\n")
    room(100)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mlx_esm_hf.runs.run.shard_bytes", stop)
        contacts(fasta, folder, tmp_path / "out.npz")
    room(1000)
    assert len(contacts(fasta, folder, tmp_path / "out.npz").left_out) == 1

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mlx_esm_hf.runs.run.shard_bytes", stop)
        contacts(fasta, folder, tmp_path / "other.npz")
    room(100)
    with pytest.raises(ValueError, match="'long' needs 0.04 GB .* When this run began, .* were free; now .* Free some"):
        contacts(fasta, folder, tmp_path / "other.npz")


def test_protein_too_large_for_any_memory(folder, tmp_path):
    (tmp_path / "p.fasta").write_text(f">titin_and_more\n{'A' * 300_000}\n>b\n{UBIQUITIN}\n")
    arguments = ["contacts", tmp_path / "p.fasta", "--model", folder, "--output", tmp_path / "top.csv"]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 3
    assert "'titin_and_more' has 300000 residues, which need" in result.output.replace("\n", " ")
    assert {row["id"] for row in csv.DictReader((tmp_path / "top.csv").open())} == {"b"}


PEAK = """
import re, sys
sys.modules["torch"] = None  # transformers would import it
import mlx.core as mx
from mlx_esm_hf import EsmTokenizer, MLXEsmConfig, MLXEsmForMaskedLM
from mlx_esm_hf import contacts
from mlx_esm_hf.jobs.contacts import bytes_needed
from mlx_esm_hf.jobs.protein_model import ProteinModel

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

config = MLXEsmConfig(vocab_size=33, pad_token_id=1, mask_token_id=32, eos_token_id=2, hidden_size=160,
                      num_hidden_layers=3, num_attention_heads=20, intermediate_size=16,
                      position_embedding_type="rotary")
network = MLXEsmForMaskedLM(config).eval()
network.load_state_dict(network.state_dict())  # as if its contact head had been trained
mx.eval(network.parameters())
model = ProteinModel(network, EsmTokenizer(sys.argv[1]))
list(contacts(["MKTAYI"], model))
before, L = peak(), 1000
list(contacts(["A" * L], model))
print(peak() - before, bytes_needed(model, L))
"""


@needs_cpu
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kernels", ["0", "1"])
def test_memory_estimate_is_an_upper_bound(kernels, tmp_path):
    """It counts the maps of one layer, whatever the number of layers."""
    arguments = [sys.executable, "-c", PEAK, write_vocabulary(tmp_path)]
    environment = os.environ | {"MLX_ESM_KERNELS": kernels, "MLX_ESM_MALLOC": "0"}
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment)
    taken, said = map(int, done.stdout.split())
    assert said / 4 < taken < said, f"{taken / 1e6:.0f} MB, {said / 1e6:.0f} MB were said"
