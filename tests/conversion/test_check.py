"""The script that compares a converted model with the original."""

import sys

import mlx.core as mx
import numpy as np
import pytest

from conversion import check, esmc, fair_esm, mlx_esm_npz
from mlx_esm_hf import MLXAutoModelForMaskedLM
from tests.conversion.checkpoints import FAMILIES, build, save
from tests.conversion.test_esmc import original_weights, write
from tests.conversion.test_mlx_esm_npz import WEIGHTS
from tests.parity import randomize


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "proteins.fasta"
    path.write_text(">a\nMKTAYIAKQRQISFVKSHFSRQ\n>b\nKALTARQQEVFDLIRDXBZUO\n")
    return path


def run(monkeypatch, capsys, *arguments):
    """Run the script and return its exit code and the outputs in its table."""
    monkeypatch.setattr(sys, "argv", ["check.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as raised:
        check.main()
    lines = capsys.readouterr().out.splitlines()
    return raised.value.code, [line[:10].strip() for line in lines[1:-1]]


LAYERS = ["layer 0", "layer 1", "layer 2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_fair_esm(tmp_path, fasta, monkeypatch, capsys, family):
    model = build(FAMILIES[family], layers=2, hidden_size=32, heads=4)
    randomize(model, seed=1)
    path = save(model, tmp_path / f"{FAMILIES[family]}.pt", regression=family != "ESM-1v")
    fair_esm.convert(path, tmp_path / "converted")
    arguments = (tmp_path / "converted", path, "--fasta", fasta)
    contacts = [] if family == "ESM-1v" else ["contacts"]
    assert run(monkeypatch, capsys, *arguments) == (0, ["logits", *LAYERS, *contacts])
    change(tmp_path / "converted", "encoder.layer.1.output.dense.bias")
    assert run(monkeypatch, capsys, *arguments)[0] == 1


def test_mlx_esm(tmp_path, fasta, monkeypatch, capsys):
    path = tmp_path / "weights.npz"
    np.savez(path, **WEIGHTS)
    mlx_esm_npz.convert(path, tmp_path / "converted")
    arguments = (tmp_path / "converted", path, "--fasta", fasta)
    assert run(monkeypatch, capsys, *arguments) == (0, ["logits", *LAYERS, "layer 3"])
    change(tmp_path / "converted", "encoder.layer.2.attention.LayerNorm.weight")
    assert run(monkeypatch, capsys, *arguments)[0] == 1


def test_esmc(tmp_path, fasta, monkeypatch, capsys):
    path = write(tmp_path, original_weights(layers=2))
    esmc.convert(path, tmp_path / "converted")
    arguments = (tmp_path / "converted", path, "--fasta", fasta)
    assert run(monkeypatch, capsys, *arguments) == (0, ["logits", *LAYERS])
    change(tmp_path / "converted", "layers.1.self_attn.k_norm.weight")
    assert run(monkeypatch, capsys, *arguments)[0] == 1


def change(folder, name, factor=1.01):
    model = MLXAutoModelForMaskedLM.from_pretrained(folder)
    state, name = model.state_dict(), f"{model.base_model_prefix}.{name}"
    model.load_state_dict({name: factor * state[name]}, strict=False)
    model.save_pretrained(folder)


def test_a_nan_difference_fails(tmp_path, fasta, monkeypatch, capsys):
    path = tmp_path / "weights.npz"
    np.savez(path, **WEIGHTS)
    mlx_esm_npz.convert(path, tmp_path / "converted")
    change(tmp_path / "converted", "encoder.layer.0.output.dense.bias", mx.nan)
    code, _ = run(monkeypatch, capsys, tmp_path / "converted", path, "--fasta", fasta)
    assert "encoder.layer.0.output.dense.bias' is damaged: 32 of its 32 values are NaN" in code


def test_a_model_of_another_size_is_refused(tmp_path, fasta, monkeypatch, capsys):
    for layers in (1, 2):
        model = build("esm2_tiny", layers=layers, hidden_size=32, heads=4)
        path = save(model, tmp_path / f"esm2_{layers}.pt")
        fair_esm.convert(path, tmp_path / f"converted_{layers}")
    code, _ = run(monkeypatch, capsys, tmp_path / "converted_1", path, "--fasta", fasta)
    assert code == "error: a: the converted model and the original have different layers or sizes."


def test_help_warns_about_loading_the_original(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check.py", "--help"])
    with pytest.raises(SystemExit):
        check.main()
    assert "can run arbitrary code from it: only check files you trust" in " ".join(capsys.readouterr().out.split())
