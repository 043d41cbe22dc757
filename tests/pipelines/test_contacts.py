import csv
from pathlib import Path

import mlx.nn as nn
import numpy as np
import pytest
import torch

from mlx_esm_hf import MLXAutoModel
from mlx_esm_hf.pipelines import contacts, load
from mlx_esm_hf.pipelines.contacts import known_contacts, precision, top_contacts
from tests.pipelines.models import UBIQUITIN, fair_esm_pair, fair_esm_tokens, write_model

SEQUENCES = [UBIQUITIN, "MKTAYIAKQR", UBIQUITIN[:40]]


@pytest.mark.parametrize("family", ["ESM-1", "ESM-1b", "ESM-2"])
def test_maps_are_fair_esm_s(family):
    model, alphabet, ours = fair_esm_pair(family)
    loaded = type(ours)(ours.network.esm, ours.tokenizer)
    for sequence, result in zip(SEQUENCES, contacts(SEQUENCES, loaded), strict=True):
        with torch.no_grad():
            theirs = model.predict_contacts(fair_esm_tokens(alphabet, sequence))[0].numpy()
        np.testing.assert_allclose(result.arrays["contacts"], theirs, atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("esm2")))


def write_pdb(path, sequence, first=100, missing=()):
    """A helix of Cβ atoms, and Cα for glycine, numbered from `first`."""
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
    with pytest.raises(ValueError, match="no chain 'B', but A"):
        known_contacts(tmp_path / "p.pdb", UBIQUITIN, "B")
    (tmp_path / "empty.pdb").write_text("nothing\n")
    with pytest.raises(ValueError, match="empty.pdb is no PDB or mmCIF file"):
        known_contacts(tmp_path / "empty.pdb", UBIQUITIN)


def test_precision_counts_the_most_probable():
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


def test_a_picture_is_of_one_protein(folder, tmp_path):
    (tmp_path / "p.fasta").write_text(">a\nMKT\n>b\nMKT\n")
    with pytest.raises(ValueError, match="holds 2"):
        contacts(tmp_path / "p.fasta", folder, tmp_path / "o.npz", picture=tmp_path / "p.png")
    for picture in (tmp_path / "map.foo", tmp_path / "nowhere" / "map.png"):
        with pytest.raises(ValueError, match="map"):
            contacts(tmp_path / "p.fasta", folder, tmp_path / "o.npz", picture=picture)
    assert not (tmp_path / "o.npz").exists()


def test_windows(tmp_path):
    folder = str(write_model(tmp_path, "ESM-1b", positions=84))  # 80 residues
    (plain,) = contacts([UBIQUITIN], folder)
    (windowed,) = contacts([UBIQUITIN], folder, long="window")
    np.testing.assert_array_equal(plain.arrays["contacts"], windowed.arrays["contacts"])
    (long,) = contacts([UBIQUITIN * 2], folder, long="window")
    found = long.arrays["contacts"]
    assert found.shape == (152, 152) and found[0, 151] == 0 and found[0, 70] > 0
    np.testing.assert_array_equal(found, found.T)


def test_a_model_without_a_contact_head_is_refused(folder):
    model = load(MLXAutoModel, folder)
    model.network = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="has no contact head: a Linear does not predict contacts"):
        contacts(["MKT"], model)


def test_a_model_without_a_trained_contact_head_is_refused(folder, tmp_path):
    from safetensors.numpy import load_file, save_file

    state = load_file(f"{folder}/model.safetensors")
    save_file(
        {k: v for k, v in state.items() if "contact_head" not in k}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    for name in ("config.json", "vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(Path(folder, name).read_bytes())
    with pytest.raises(ValueError, match="contact"):
        contacts(["MKT"], str(tmp_path))
