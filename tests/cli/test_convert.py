import json

import pytest
from typer.testing import CliRunner

from mlx_esm_hf.cli import app
from mlx_esm_hf.cli.convert import parse_rule
from tests.jobs.models import UBIQUITIN, write_model


@pytest.fixture(scope="module")
def esm2(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("esm2"))


def run(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_quantize_with_a_report_and_back(esm2, tmp_path):
    (tmp_path / "in.fasta").write_text(f">ubiquitin\n{UBIQUITIN}\n")
    options = ["-q", "--bits", 4, "--group-size", 32, "--rule", "lm_head.*=8", "--rule", "*.layer.0.*=full"]
    done = run(esm2, tmp_path / "quantized", *options, "--report", tmp_path / "in.fasta")
    assert done.exit_code == 0, done.output
    for said in (
        "13 layers are quantized: 12 to 4 bits in groups of 32 (affine), 1 to 8 bits",
        "size on disk",
        "pseudo-perplexity, every 8th residue masked",
        "mean |Δ log p| at masked residues",
        "Spearman of the effects of 1444 mutations",
        "same contacts among the top L/5",
        "residues per second",
        "peak memory of embedding",
    ):
        assert said in done.output
        assert said in (tmp_path / "quantized" / "CONVERSION.md").read_text()
    figures = json.loads((tmp_path / "quantized" / "CONVERSION.json").read_text())
    assert (figures["proteins"], figures["residues"], figures["mutations"]["count"]) == (1, 76, 1444)
    for name, share in (
        ("pseudo-perplexity, every 8th residue masked", f"{figures['pseudo_perplexity']['after']:.3f}"),
        ("min cosine of protein embeddings", f"{figures['protein_cosine']['min']:.6f}"),
        ("same contacts among the top L/2", f"{figures['same_contacts']['L/2']:.2%}"),
    ):
        (line,) = (line for line in done.output.splitlines() if line.startswith(name))
        assert line.split()[-1] == share
    block = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization"]
    assert block["bits"] == 4 and block["lm_head.dense"]["bits"] == 8
    back = run(
        tmp_path / "quantized", tmp_path / "plain", "--dequantize", "--dtype", "float16", "--max-shard-size", "20KB"
    )
    assert back.exit_code == 0 and (tmp_path / "plain" / "model.safetensors.index.json").exists(), back.output


def test_mlx_lm_option_names(esm2, tmp_path):
    done = run(esm2, tmp_path / "quantized", "--quantize", "--q-bits", 8, "--q-group-size", 32, "--q-mode", "affine")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization"]["bits"] == 8


def test_errors_have_no_traceback(esm2, tmp_path):
    for arguments, said in (
        (["--bits", "4"], "Error: bits: only valid with quantize."),
        (["-q", "--mode", "fp4"], "Error: mode must be one of affine, mxfp4, mxfp8, nvfp4, got 'fp4'."),
        (["-q", "--rule", "lm_head"], "Error: --rule must be PATTERN=HOW such as lm_head.*=8, got lm_head."),
        (["--report", tmp_path / "nothing.fasta"], "nothing.fasta"),
    ):
        done = run(esm2, tmp_path / "result", *arguments)
        assert done.exit_code == 1 and said in done.output and "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


def test_rules():
    assert parse_rule("lm_head.*=8") == ("lm_head.*", 8)
    assert parse_rule("*.query=mxfp4") == ("*.query", "mxfp4")
    assert parse_rule("*.layer.[05].*=full") == ("*.layer.[05].*", None)
