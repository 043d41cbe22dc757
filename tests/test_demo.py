"""The demo model included in the package."""

import json
from pathlib import Path

import numpy as np
import transformers
from typer.testing import CliRunner

from mlx_esm_hf import MLXEsmForMaskedLM, demo_model
from mlx_esm_hf.cli import app
from mlx_esm_hf.data.source import read_proteins

PROTEINS = Path(__file__).parents[1] / "examples" / "proteins.fasta"


def test_is_small_logs_a_warning_and_loads_in_torch(caplog):
    folder = Path(demo_model())
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
    fasta, output = tmp_path / "in.fasta", tmp_path / "out.csv"
    proteins = list(read_proteins(PROTEINS))[:3]
    fasta.write_text("".join(f">{protein.id}\n{protein.sequence[:60]}\n" for protein in proteins))
    arguments = ["perplexity", fasta, "--model", "demo", "--output", output, "--quiet"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert caplog.text.count("for trying things out") == 1
    rows = [line.split(",") for line in output.read_text().splitlines()]
    assert [row[1] for row in rows[1:]] == [protein.id for protein in proteins]
    assert all(10 < float(row[rows[0].index("pseudo_perplexity")]) < 21 for row in rows[1:])  # 20 is a uniform guess


def test_card_has_the_numbers_of_the_log():
    folder = Path(demo_model())
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-2])
    assert f"{last['step']:,} steps, {last['tokens']:,} tokens" in (folder / "README.md").read_text()
