"""The demo model included in the package."""

import json
from pathlib import Path

import numpy as np
import transformers
from typer.testing import CliRunner

from mlx_esm_hf import MLXEsmForMaskedLM, demo_model
from mlx_esm_hf.cli import app
from mlx_esm_hf.data.source import read_proteins
from mlx_esm_hf.dtypes import warn_once

PROTEINS = Path(__file__).parents[1] / "examples" / "proteins.fasta"


def test_is_small_logs_a_notice_and_loads_in_torch(caplog):
    folder = Path(demo_model())
    assert not caplog.text
    warn_once.cache_clear()
    MLXEsmForMaskedLM.from_pretrained(demo_model())
    assert len(caplog.messages) == 1  # nothing about half precision
    assert "for trying things out" in caplog.text and "facebook/esm2_t33_650M_UR50D" in caplog.text
    assert sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) <= 4_000_000
    assert "far too small for answers" in (folder / "README.md").read_text()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("MQIFVKTLTGKTITLEVEPSDT<mask>ENVK", return_tensors="pt")
    theirs = transformers.EsmForMaskedLM.from_pretrained(folder, dtype="float32").eval()
    ours = MLXEsmForMaskedLM.from_pretrained(folder, dtype="float32")
    expected = theirs(**inputs).logits.detach().numpy()
    assert np.abs(np.array(ours(**inputs).logits) - expected).max() < 1e-4 * np.abs(expected).max()


def test_command_accepts_its_name(tmp_path, caplog):
    warn_once.cache_clear()
    fasta, output = tmp_path / "in.fasta", tmp_path / "out.csv"
    proteins = list(read_proteins(PROTEINS))[:3]
    fasta.write_text("".join(f">{protein.id}\n{protein.sequence[:60]}\n" for protein in proteins))
    arguments = ["perplexity", fasta, "--model", "demo", "--output", output, "--quiet"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert not caplog.messages  # --quiet
    rows = [line.split(",") for line in output.read_text().splitlines()]
    assert [row[1] for row in rows[1:]] == [protein.id for protein in proteins]
    assert all(10 < float(row[rows[0].index("pseudo_perplexity")]) < 21 for row in rows[1:])  # 20 is a uniform guess


def test_contacts_are_refused(tmp_path, caplog):
    """The demo model has no contact head, and other commands do not mention it."""
    (tmp_path / "in.fasta").write_text(">a\nMKTAYIAKQR\n")
    arguments = [tmp_path / "in.fasta", "--model", "demo", "--output"]
    result = CliRunner().invoke(app, ["contacts", *map(str, arguments), str(tmp_path / "out.npz")])
    assert result.exit_code == 1 and not (tmp_path / "out.npz").exists()
    for part in ("had no contact_head", "Masked language modelling does not train it", "facebook/esm2_t33_650M_UR50D"):
        assert part in result.output
    CliRunner().invoke(app, ["perplexity", *map(str, arguments), str(tmp_path / "out.csv")])
    assert (tmp_path / "out.csv").exists() and "contact" not in caplog.text


def test_card_has_the_numbers_of_the_log():
    folder = Path(demo_model())
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-2])
    assert f"{last['step']:,} steps, {last['tokens']:,} tokens" in (folder / "README.md").read_text()


def test_nothing_that_is_written_names_its_folder(tmp_path, monkeypatch):
    """Files of two machines or environments are equal: the model is called demo."""
    monkeypatch.chdir(tmp_path)
    Path("in.fasta").write_text(">a\nMKTAYIAK\n>b\nMKTAYIA\n")
    rows = [f"MKTAYI{x}{y},{x}" for x in "AC" for y in "ACDEFGHIKLMNPQRSTVWY"]
    Path("in.csv").write_text("\n".join(["sequence,label", *rows]))
    for line in (
        "embed in.fasta -m demo -o new/embeddings",
        "score --sequence MKTAYI -m demo -o new/scores.csv",
        "finetune in.csv -m demo -o new/tuned --steps 1 --validation-share 0.3",
        "convert demo new/converted --quantize",
    ):
        result = CliRunner().invoke(app, line.split())
        assert result.exit_code == 0, result.output
    assert Path("new/scores.csv").read_text().startswith("mutant,demo\n")
    assert json.loads(Path("new/embeddings/manifest.json").read_text())["settings"]["model"] == "demo"
    assert json.loads(Path("new/tuned/adapter_config.json").read_text())["base_model_name_or_path"] == "demo"
    found = [path for path in Path("new").rglob("*") if path.is_file() and demo_model().encode() in path.read_bytes()]
    assert not found
