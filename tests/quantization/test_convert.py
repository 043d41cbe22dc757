"""`convert`: checkpoints in another precision, compared with torch, and the report."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer, EsmTokenizer

import mlx_esm_hf
from conversion import mlx_esm_npz
from mlx_esm_hf import MLXEsmForMaskedLM, MLXEsmForSequenceClassification, MLXEsmModel, convert, embed
from mlx_esm_hf.dtypes import STORED_DTYPES
from mlx_esm_hf.hub.files import read_checkpoint
from mlx_esm_hf.jobs.protein_model import load_protein_model
from mlx_esm_hf.ops import kernels
from mlx_esm_hf.quantization.layers import block_of
from tests.checkpoints import assert_same_state, config, save_bin_shards, theirs, torch_model, write_random
from tests.hub import Hub, serve, use
from tests.jobs.models import UBIQUITIN, write_model
from tests.marks import needs_cpu
from tests.vocabulary import write_vocabulary

ROOT = Path(mlx_esm_hf.__file__).parents[1]
FASTA = ROOT / "examples" / "proteins.fasta"
PROTEINS = [UBIQUITIN, "MKTAYIAKQR", "GG", "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"]


@pytest.fixture(scope="module")
def esm2(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("esm2"))


def with_tokenizer(folder):
    EsmTokenizer(write_vocabulary(folder)).save_pretrained(folder)
    return folder


def names(folder):
    return {path.name for path in Path(folder).iterdir()}


def rows(conversion):
    return {what: values for what, *values in conversion.rows}


# Without quantizing


@pytest.mark.parametrize("task", ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"])
@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_dtype(dtype, task, tmp_path):
    """Transformers loads the result without a warning, with the values of its own cast."""
    model = torch_model(task, num_labels=3)
    model.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", dtype=dtype)
    loaded, info = theirs(task).from_pretrained(tmp_path / "ours", dtype="auto", output_loading_info=True)
    assert not any(info.values()) and loaded.dtype == getattr(torch, dtype)
    frequencies = "rotary_embeddings.inv_freq"  # a buffer, which is never cast
    expected = {k: v if k.endswith(frequencies) else v.to(loaded.dtype) for k, v in model.state_dict().items()}
    found = loaded.state_dict()
    assert_same_state(*({k: v for k, v in s.items() if not k.endswith(frequencies)} for s in (found, expected)))


@pytest.mark.parametrize(
    "options", [{"dtype": "float16"}, {"dtype": "float16", "quantize": True}], ids=["cast", "quantized"]
)
def test_overflow_is_refused(options, tmp_path):
    model = torch_model()
    with torch.no_grad():
        model.esm.encoder.layer[1].output.dense.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "source")
    expected = r"'esm.encoder.layer.1.output.dense.(weight|scales|biases)' has values up to 1e\+06, which overflow in"
    with pytest.raises(ValueError, match=expected):
        convert(tmp_path / "source", tmp_path / "half", **options)
    assert names(tmp_path) == {"source"}
    convert(tmp_path / "source", tmp_path / "brain", dtype="bfloat16")


def test_damaged_source_is_refused(tmp_path):
    model = torch_model()
    with torch.no_grad():
        model.lm_head.bias[0] = torch.nan
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="'lm_head.bias' is damaged: 1 of its 33 values are NaN or infinite"):
        convert(tmp_path / "source", tmp_path / "copy")


def test_report_without_a_tokenizer(tmp_path):
    torch_model().save_pretrained(tmp_path / "source")
    with pytest.raises((OSError, ValueError), match="tokenizer"):
        convert(tmp_path / "source", tmp_path / "half", dtype="float16", report=PROTEINS)
    assert names(tmp_path) == {"source"}


def test_from_bin_in_shards_to_shards(tmp_path):
    (tmp_path / "bin").mkdir()
    model = torch_model()
    save_bin_shards(model, tmp_path / "bin")
    config(architectures=["EsmForMaskedLM"]).save_pretrained(tmp_path / "bin")
    convert(tmp_path / "bin", tmp_path / "ours", max_shard_size="20KB")
    assert len([name for name in names(tmp_path / "ours") if name.endswith(".safetensors")]) > 2
    loaded = transformers.EsmForMaskedLM.from_pretrained(tmp_path / "ours")
    assert_same_state(loaded.state_dict(), model.state_dict())


def test_half_precision_is_kept(tmp_path):
    write_model(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "half", dtype="float16")
    convert(tmp_path / "half", tmp_path / "again", quantize=True, group_size=32)
    arrays = load_file(tmp_path / "again" / "model.safetensors")
    assert arrays["esm.encoder.layer.0.attention.self.query.scales"].dtype == torch.float16
    assert arrays["lm_head.dense.weight"].dtype == torch.float16
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "float16"


def test_half_precision_without_dtype_in_the_config(tmp_path):
    model = torch_model().half()
    model.save_pretrained(tmp_path / "source")
    settings = json.loads((tmp_path / "source" / "config.json").read_text())
    del settings["dtype"]
    (tmp_path / "source" / "config.json").write_text(json.dumps(settings))
    done = convert(tmp_path / "source", tmp_path / "result")
    assert done.notes[-1] == "The weights are float16."
    loaded = transformers.EsmForMaskedLM.from_pretrained(tmp_path / "result")
    assert_same_state(dict(loaded.named_parameters()), dict(model.named_parameters()))


@pytest.mark.parametrize("options", [{}, {"quantize": True, "rules": {"*pooler*": 8}}])
def test_random_parameters_are_not_written(options, tmp_path):
    """Parameters that the source lacks are not written: a random head must not look like a trained one."""
    model = torch_model("Model")
    model.pooler = None
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("contact_head")}
    model.save_pretrained(tmp_path / "source", state_dict=state)
    convert(tmp_path / "source", tmp_path / "result", **options)
    _, info = MLXEsmModel.from_pretrained(tmp_path / "result", output_loading_info=True)
    missing = {f"pooler.dense.{name}" for name in ("weight", "bias")}
    assert info["missing_keys"] == missing | {f"contact_head.regression.{name}" for name in ("weight", "bias")}


def test_complete_repository(esm2, tmp_path):
    """The tokenizer is copied byte for byte and everything can be published; the model card is left out."""
    (esm2 / "README.md").write_text("# Theirs")
    (esm2 / "LICENSE").write_text("MIT")
    (esm2 / "notes.txt").write_text("mine")
    try:
        convert(esm2, tmp_path / "result")
    finally:
        for name in ("README.md", "LICENSE", "notes.txt"):
            (esm2 / name).unlink()
    result = tmp_path / "result"
    expected = {"config.json", "model.safetensors", "CONVERSION.md", "LICENSE", "vocab.txt", "tokenizer_config.json"}
    assert names(result) == set(read_checkpoint(result).files) == expected
    for name in ("vocab.txt", "tokenizer_config.json"):
        assert (result / name).read_bytes() == (esm2 / name).read_bytes()
    assert AutoTokenizer.from_pretrained(result)("MKT")["input_ids"] == [0, 20, 15, 11, 2]
    assert "Made from esm2" in (result / "CONVERSION.md").read_text()
    assert str(esm2.parent) not in (result / "CONVERSION.md").read_text()  # only a folder's name is published


# Quantizing


SPECS = [
    {"bits": 2},
    {"bits": 3},
    {"bits": 4},
    {"bits": 6},
    {"bits": 8},
    {"mode": "mxfp4"},
    {"mode": "mxfp8"},
    {"mode": "nvfp4"},
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_quantize_and_dequantize(spec, esm2, tmp_path):
    """The dequantized checkpoint gives in torch what the quantized one gives here."""
    affine = {"group_size": 32} if "bits" in spec else {}
    conversion = convert(esm2, tmp_path / "quantized", quantize=True, **spec, **affine)
    model = MLXEsmForMaskedLM.from_pretrained(tmp_path / "quantized")
    block = block_of(model)
    assert block.items() >= spec.items()
    assert re.match(rf"18 layers are quantized: \d+ to {block['bits']} bits in groups of ", conversion.notes[1])
    back = convert(tmp_path / "quantized", tmp_path / "plain", dequantize=True)
    assert back.notes[1:] == [
        "The weights were dequantized and keep their quantized values.",
        "The weights are float32.",
    ]
    plain = transformers.EsmForMaskedLM.from_pretrained(tmp_path / "plain").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "plain")(UBIQUITIN)["input_ids"]
    with torch.no_grad():
        outputs = plain(torch.tensor([ids])).logits.numpy()
    logits = np.array(model([ids]).logits)
    assert np.abs(logits - outputs).max() < 1e-4 * np.abs(outputs).max()
    original = np.array(MLXEsmForMaskedLM.from_pretrained(esm2)([ids]).logits)
    assert np.abs(original - outputs).max() > 1e-3  # it was quantized


def test_more_bits_are_closer(esm2, tmp_path):
    def log_probabilities(folder):
        model = load_protein_model(mlx_esm_hf.MLXAutoModelForMaskedLM, str(folder))
        return np.concatenate(model.blended_log_probabilities([model.encode(protein) for protein in PROTEINS]))

    differences = []
    for bits in (2, 3, 4, 5, 6, 8):
        convert(esm2, tmp_path / str(bits), quantize=True, bits=bits, group_size=32)
        differences.append(np.abs(log_probabilities(tmp_path / str(bits)) - log_probabilities(esm2)).mean())
    assert differences == sorted(differences, reverse=True) and differences[-1] < differences[0] / 20


def test_rules_and_smaller_groups(tmp_path):
    write_model(tmp_path / "source")
    rules = {"*word_embeddings": 8, "lm_head.*": "nvfp4", "*.layer.0.*": None}
    done = convert(tmp_path / "source", tmp_path / "result", quantize=True, bits=3, rules=rules)
    block = json.loads((tmp_path / "result" / "config.json").read_text())["quantization"]
    assert (block["bits"], block["group_size"], block["mode"]) == (3, 32, "affine")
    assert block["esm.embeddings.word_embeddings"] == {"bits": 8, "group_size": 32, "mode": "affine"}
    assert block["lm_head.dense"] == {"bits": 4, "group_size": 16, "mode": "nvfp4"}
    assert block["esm.encoder.layer.1.output.dense"] == {"bits": 3, "group_size": 64, "mode": "affine"}
    assert block["esm.encoder.layer.0.output.dense"] is False
    assert done.notes[1:] == [
        "14 layers are quantized: 10 to 3 bits in groups of 32 (affine), 2 to 3 bits in groups of 64 (affine), "
        "1 to 4 bits in groups of 16 (nvfp4), 1 to 8 bits in groups of 32 (affine).",
        "Other weights are float32.",
    ]


def test_jobs_accept_quantized_models(esm2, tmp_path):
    convert(esm2, tmp_path / "quantized", quantize=True, bits=8, group_size=32)
    embed(PROTEINS, str(tmp_path / "quantized"), tmp_path / "out.npz")
    embed(PROTEINS, str(esm2), tmp_path / "original.npz")
    a, b = (np.load(tmp_path / name)["mean"] for name in ("out.npz", "original.npz"))
    cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert (cosines > 0.99).all() and not np.array_equal(a, b)


def test_invalid_options(esm2, tmp_path):
    for options, message in (
        ({"bits": 4}, "bits: only valid with quantize"),
        ({"rules": {"*": 8}, "mode": "mxfp4"}, "mode, rules: only valid with quantize"),
        ({"quantize": True, "dequantize": True}, "Pass either quantize or dequantize"),
        ({"quantize": True, "bits": 7}, "got 7"),
        ({"quantize": True, "rules": {"*": "int8"}}, "mode must be one of affine, mxfp4, mxfp8, nvfp4, got 'int8'"),
        ({"quantize": True, "rules": {"heads": 8}}, "No layer matches 'heads'"),
        ({"quantize": True, "rules": {"*": None}}, "No layer can be quantized."),
        (
            {"quantize": True, "mode": "mxfp4", "rules": {"*embeddings": "mxfp4"}},
            "embedding table must be 'affine', got 'mxfp4'",
        ),
        ({"dequantize": True}, "is not quantized"),
        ({"dtype": "int8"}, "dtype must be one of float32, float16, bfloat16, got 'int8'"),
        ({"report": []}, "The report has no proteins"),
        ({"report": ["M1"]}, "'1' has '1' at position 2"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            convert(esm2, tmp_path / "result", **options)
    assert not names(tmp_path)  # not even a temporary folder is left
    convert(esm2, tmp_path / "quantized", quantize=True, group_size=32)
    with pytest.raises(ValueError, match="quantized is already quantized"):
        convert(tmp_path / "quantized", tmp_path / "result", quantize=True)
    with pytest.raises(FileExistsError, match="quantized already exists. Nothing was written"):
        convert(esm2, tmp_path / "quantized")
    with pytest.raises(OSError, match="nowhere"):
        convert(tmp_path / "nowhere", tmp_path / "result")
    assert names(tmp_path) == {"quantized"}


@pytest.mark.parametrize("shard", ["5GB", "9KB"])
def test_full_disk(shard, esm2, tmp_path):
    """If a file cannot grow, one of several or the only one, nothing is left behind."""
    convert(esm2, tmp_path / "measured", quantize=True, group_size=32, max_shard_size=shard)
    sizes = sorted((file.stat().st_size for file in (tmp_path / "measured").glob("*.safetensors")), reverse=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[0] - 1, hard))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(OSError, match=r"model.*\.safetensors cannot be written .* Is the disk full\?"):
            convert(esm2, tmp_path / "result", quantize=True, group_size=32, max_shard_size=shard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (len(sizes) > 2) == (shard == "9KB") and names(tmp_path) == {"measured"}


def test_no_group_size_divides_the_widths(tmp_path):
    model = MLXEsmModel(config(hidden_size=12, intermediate_size=24))
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(
        ValueError, match=re.escape("No layer can be quantized. No group size divides the widths [12, 24]")
    ):
        convert(tmp_path / "source", tmp_path / "result", quantize=True)


def test_output_is_the_working_directory(esm2, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    convert(esm2, ".")
    assert "model.safetensors" in names(tmp_path / "here") and names(tmp_path) == {"here"}


def test_config_without_architectures(tmp_path):
    torch_model().save_pretrained(tmp_path / "source")
    config().save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="has no `architectures`, so its head would be lost"):
        convert(tmp_path / "source", tmp_path / "result")


def test_publish(esm2, tmp_path, monkeypatch):
    """Convert one repository into another, whose card names the first, and load it."""
    hub = Hub(users={"hf_me": "me"})
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve(hub) as endpoint:
        use(monkeypatch, endpoint)
        mlx_esm_hf.hub.publish(esm2, "me/esm")
        done = convert("me/esm", tmp_path / "quantized", quantize=True, group_size=32, upload_repo="me/quantized")
        files = hub.repos["me/quantized"].files()
        assert set(files) == names(tmp_path / "quantized") | {".gitattributes", "README.md"}
        card = files["README.md"].decode()
        assert "base_model: me/esm" in card and "quantized to 4 bits in groups of 32" in card
        commit = hub.repos["me/esm"].refs["main"]
        assert f"## Conversion\n\nMade from me/esm ({commit[:12]}) by mlx-esm-hf" in card and "| size on disk |" in card
        assert done.publication.commit.oid == hub.repos["me/quantized"].refs["main"]
        ids = [[0, 20, 15, 11, 2]]
        published = MLXEsmForMaskedLM.from_pretrained("me/quantized")(ids).logits
        assert mx.array_equal(published, MLXEsmForMaskedLM.from_pretrained(tmp_path / "quantized")(ids).logits)


# The report


def test_report_of_a_classifier(tmp_path):
    torch_model("ForSequenceClassification", num_labels=3, max_position_embeddings=1026).save_pretrained(tmp_path / "a")
    with_tokenizer(tmp_path / "a")
    done = convert(tmp_path / "a", tmp_path / "b", quantize=True, bits=4, group_size=32, report=PROTEINS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    a, b = (MLXEsmForSequenceClassification.from_pretrained(tmp_path / name) for name in "ab")
    ids = [tokenizer(sequence, return_tensors="mlx") for sequence in PROTEINS]
    expected = np.mean([np.abs(np.array(a(**x).logits - b(**x).logits)).mean() for x in ids])
    table = rows(done)
    assert float(table["mean |Δlogit|"][1]) == pytest.approx(expected, rel=1e-3)
    assert "same top class" in table and table["pseudo-perplexity"] == ["no language-model head", ""]


def test_report_without_a_head(tmp_path):
    torch_model("Model", max_position_embeddings=1026).save_pretrained(tmp_path / "a")
    with_tokenizer(tmp_path / "a")
    coarse = convert(tmp_path / "a", tmp_path / "coarse", quantize=True, bits=2, group_size=32, report=PROTEINS)
    assert 0 < float(rows(coarse)["mean cosine of residue embeddings"][1]) < 0.99
    assert "same top class" not in rows(coarse) and "mean |Δlogit|" not in rows(coarse)


@pytest.mark.long
def test_trained_language_model(tmp_path, capsys):
    """8 bits keep the top residue at 99% of the masked positions of real proteins."""
    if "MLX_ESM_SEED_WEIGHTS" not in os.environ:
        pytest.skip("MLX_ESM_SEED_WEIGHTS must name weights/esm1-202402151405.npz of usmanm/mlx-esm")
    mlx_esm_npz.convert(Path(os.environ["MLX_ESM_SEED_WEIGHTS"]), tmp_path / "trained")
    kept = {}
    for spec in SPECS:
        done = convert(tmp_path / "trained", tmp_path / str(spec), quantize=True, **spec, report=FASTA)
        table = rows(done)
        kept[str(spec)] = float(table["same top residue where masked"][1].rstrip("%"))
        with capsys.disabled():
            print(f"\n{spec}", *(f"{what} {' '.join(values)}" for what, values in table.items()), sep="; ")
    assert kept["{'bits': 8}"] >= 99
    assert kept["{'bits': 2}"] < kept["{'bits': 3}"] < kept["{'bits': 4}"] < kept["{'bits': 6}"] < kept["{'bits': 8}"]


def test_report_with_long_proteins(tmp_path):
    write_model(tmp_path / "esm1b", family="ESM-1b", positions=42)
    proteins = [UBIQUITIN, UBIQUITIN[:42]]
    done = convert(tmp_path / "esm1b", tmp_path / "half", dtype="bfloat16", report=proteins)
    assert float(rows(done)["mean |Δ log p| at masked residues"][1]) > 0


def test_size(esm2, tmp_path):
    done = convert(esm2, tmp_path / "half", dtype="float16")
    before, after = ((place / "model.safetensors").stat().st_size for place in (esm2, tmp_path / "half"))
    assert rows(done)["size on disk"] == [f"{before / 1e6:,.1f} MB", f"{after / 1e6:,.1f} MB"]
    parameters = MLXEsmForMaskedLM.from_pretrained(esm2).num_parameters()
    assert rows(done)["bits a parameter"] == [f"{8 * size / parameters:.2f}" for size in (before, after)]


# Memory


CONVERT_AND_LOAD = r"""
import re, sys
from pathlib import Path
sys.modules["torch"] = None  # torch is not needed
what, source, target = sys.argv[1:]
status = lambda name: int(re.search(name + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
from mlx_esm_hf import MLXAutoModelForMaskedLM
from mlx_esm_hf import convert
before = status("VmHWM")
if what == "convert":
    convert(source, target, quantize=True, bits=4)
    print(status("VmHWM") - before)
else:
    model = MLXAutoModelForMaskedLM.from_pretrained(target)
    print(status("VmRSS") - before)
    ids = [[0, *(4 + i % 20 for i in range(76)), 2]]
    model(ids).logits.sum().item()
    print(status("VmHWM"), sum(x.nbytes for _, x in model.named_parameters()))
"""


def esm2_of(layers, width, heads):
    shape = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return config(intermediate_size=4 * width, **shape), transformers.EsmForMaskedLM


def esmc_of(layers, width, heads, gated):
    shape = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return transformers.EsmcConfig(intermediate_size=gated, **shape), transformers.EsmcForMaskedLM


def large(model, dtype, limit, *marks, format="safetensors"):
    return pytest.param(model, format, dtype, limit, id=f"{model}-{format}", marks=marks)


LARGE = {
    "38M": lambda: esm2_of(12, 512, 16),
    "650M": lambda: esm2_of(33, 1280, 20),
    "3B": lambda: esm2_of(36, 2560, 40),
    "ESMC-6B": lambda: esmc_of(80, 2560, 40, 6912),
    "15B": lambda: esm2_of(48, 5120, 40),
}


@needs_cpu
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("model", "format", "dtype", "limit"),
    [
        large("38M", "float32", 0.2e9),
        large("38M", "float32", 0.2e9, format="bin"),
        large("650M", "float32", 0.7e9, pytest.mark.long),
        large("3B", "float16", 2.2e9, pytest.mark.long),
        large("ESMC-6B", "float16", 4.2e9, pytest.mark.long),
        large("15B", "float16", 9.5e9, pytest.mark.long),
    ],
)
def test_memory(model, format, dtype, limit, tmp_path, capsys):
    """Check the memory of converting and running a model.

    Converting needs the memory of the largest array. Running the 4-bit model on 76 residues stays below the limit,
    including the whole process and the mapped pages of the file.
    """
    shape, model_class = LARGE[model]()
    with torch.device("meta"):
        sizes = [4 * parameter.numel() for parameter in model_class(shape).parameters()]  # in float32
    needed = sum(sizes) / (2 if dtype == "float16" else 1) * 1.3
    if shutil.disk_usage(tmp_path).free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of disk")
    (tmp_path / "source").mkdir()
    size = write_random(tmp_path / "source", format, dtype, shape, model_class)

    def run(what):
        command = [sys.executable, "-c", CONVERT_AND_LOAD, what, tmp_path / "source", tmp_path / "quantized"]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        return [int(number) for number in done.stdout.split()]

    (converting,) = run("convert")
    shutil.rmtree(tmp_path / "source")
    loaded, peak, quantized = run("load")
    shutil.rmtree(tmp_path / "quantized")
    with capsys.disabled():
        print(f"\n{model}: float32 {size / 1e6:.0f} MB, 4 bits {quantized / 1e6:.0f} MB; memory added by conversion")
        print(f"{converting / 1e6:.0f} MB, by loading {loaded / 1e6:.0f} MB; peak of a run {peak / 1e6:.0f} MB")
    assert quantized < 0.17 * size  # 4 of 32 bits, and two float32 per 64 weights
    assert loaded < quantized + 0.05 * size
    read = size if format == "bin" and kernels.native is None else 0  # without the kernels a .bin file is not mapped
    assert converting < 100e6 + 2 * max(sizes) + read
    assert peak < limit
