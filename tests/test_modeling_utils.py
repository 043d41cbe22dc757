"""Loading and saving, compared with transformers reading and writing the same folders."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.optimizers import SGD
from safetensors import safe_open

import mlx_esm_hf
from mlx_esm_hf import MLXEsm1Config, MLXEsmConfig, MLXEsmForMaskedLM, MLXEsmModel, dtypes
from mlx_esm_hf.errors import CheckpointError
from tests.checkpoints import (
    FORMATS,
    INPUTS,
    KINDS,
    SHARD,
    TASKS,
    assert_close,
    assert_loads_as_transformers,
    assert_same_state,
    config,
    heard,
    layout_4x,
    ours,
    python_of_transformers_4,
    run,
    save,
    save_bin,
    save_shards,
    theirs,
    torch,
    torch_model,
    without,
    write,
    write_large,
)
from tests.marks import needs_cpu, needs_kernels
from tests.tiny import SIZE, as_loaded

ROOT = Path(mlx_esm_hf.__file__).parents[1]


@pytest.fixture(autouse=True)
def _reset_warnings():
    """Log warnings that appear once per process once per test."""
    dtypes.warn_once.cache_clear()


@pytest.fixture
def folder(tmp_path):
    """An ESM-2 with its language-model head, saved by transformers 5."""
    save(torch_model(), tmp_path / "esm2")
    return tmp_path / "esm2"


def bits(model):
    """Return the state dict as {name: (dtype, bytes)}; inverse frequencies, whose dtype is the file's, as float32."""
    state = {name: x.astype(mx.float32) if "inv_freq" in name else x for name, x in model.state_dict().items()}
    return {name: (x.dtype, np.array(x.view(mx.uint8)).tobytes()) for name, x in state.items()}


# Formats


@pytest.mark.parametrize(("kind", "task"), [*(("esm2", task) for task in TASKS), ("esm1b", "ForMaskedLM")])
@pytest.mark.parametrize("format", FORMATS)
def test_formats(format, kind, task, tmp_path):
    FORMATS[format](torch_model(task, kind), tmp_path)
    assert_loads_as_transformers(tmp_path, task)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_formats_in_half_precision(format, dtype, tmp_path):
    FORMATS[format](torch_model().to(dtype), tmp_path)
    assert_loads_as_transformers(tmp_path, "ForMaskedLM")
    model = MLXEsmForMaskedLM.from_pretrained(tmp_path, dtype=dtype)
    state = torch_model().to(dtype).state_dict()
    for name, array in model.named_parameters():
        assert array.dtype == dtypes.as_dtype(dtype), name
        assert np.array_equal(np.array(array.astype(mx.float32)), state[name].float().numpy()), name


@pytest.mark.parametrize("format", [save, save_shards, save_bin])
def test_variant(format, tmp_path):
    format(torch_model(kind="esm1b"), tmp_path, variant="other")
    assert_loads_as_transformers(tmp_path, "ForMaskedLM", variant="other")
    with pytest.raises(OSError, match="contains no weights: none of model.safetensors"):
        MLXEsmForMaskedLM.from_pretrained(tmp_path)


def test_use_safetensors(tmp_path):
    """A folder with both formats, whose biases differ, shows which one is read."""
    model = torch_model()
    for value, format in enumerate((save, save_bin)):
        model.lm_head.bias.data.fill_(value)
        format(model, tmp_path)
    for choice, value in ((None, 0), (True, 0), (False, 1)):
        loaded = MLXEsmForMaskedLM.from_pretrained(tmp_path, use_safetensors=choice)
        assert (loaded.lm_head.bias == value).all(), choice
    (tmp_path / "model.safetensors").unlink()
    assert (MLXEsmForMaskedLM.from_pretrained(tmp_path).lm_head.bias == 1).all()
    with pytest.raises(OSError, match=r"none of model.safetensors, model.safetensors.index.json was found"):
        MLXEsmForMaskedLM.from_pretrained(tmp_path, use_safetensors=True)


def test_subfolder(tmp_path):
    for format in ("save", "save_shards", "save_bin_shards"):
        (tmp_path / format).mkdir()
        FORMATS[format](torch_model(), tmp_path / format)
        assert_loads_as_transformers(tmp_path, "ForMaskedLM", subfolder=format)


# Dialects: {name: state dict of a model, prefix of its base model -> state dict}


def gamma_beta(state, prefix):
    renames = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for old, new in renames.items():
        state = {key.replace(old, new): x for key, x in state.items()}
    return state


def asterisk(state, prefix):
    key = f"{prefix}encoder.layer.*.attention.self.rotary_embeddings.inv_freq"
    return without("inv_freq")(state, prefix) | {key: torch.tensor([0.9, 0.4, 0.2, 0.1])}


def other_prefix(state, prefix):
    """Convert a base model's keys to those of a model with a head, or the reverse."""
    state = layout_4x(state, prefix)
    return {key.removeprefix(prefix) if prefix else f"esm.{key}": x for key, x in state.items()}


DIALECTS = {
    "5.x in memory": lambda state, prefix: state,
    "4.x": layout_4x,
    "4.x, no decoder": without("lm_head.decoder"),
    "4.x, position table": lambda state, prefix: (
        layout_4x(state, prefix) | {f"{prefix}embeddings.position_embeddings.weight": torch.randn(40, 32)}
    ),
    "4.x, float16 frequencies": lambda state, prefix: layout_4x(state, prefix, lambda layer, stored: stored.half()),
    "4.x, frequencies by layer": lambda state, prefix: layout_4x(
        state, prefix, lambda layer, stored: stored * (layer + 1.5)
    ),
    "gamma and beta": lambda state, prefix: gamma_beta(layout_4x(state, prefix), prefix),
    "asterisk": lambda state, prefix: gamma_beta(asterisk(state, prefix), prefix),
    "other prefix": other_prefix,
    "no contact head": without("contact_head"),
    "unknown keys": lambda state, prefix: (
        layout_4x(state, prefix) | {"esm.encoder.layer.7.extra": torch.ones(2), "extra": torch.ones(2)}
    ),
}


@pytest.mark.parametrize("saved", ["Model", "ForMaskedLM"])
@pytest.mark.parametrize(
    ("kind", "dialect"), [*(("esm2", name) for name in DIALECTS), ("esm1b", "4.x"), ("esm1v", "gamma and beta")]
)
def test_dialects(kind, dialect, saved, tmp_path):
    """Classes load each other's checkpoints in every dialect and report the same keys as transformers."""
    state = DIALECTS[dialect](torch_model(saved, kind).state_dict(), "" if saved == "Model" else "esm.")
    write(tmp_path, state, kind)
    for loaded in ("Model", "ForMaskedLM", "ForSequenceClassification"):
        assert_loads_as_transformers(tmp_path, loaded)


@pytest.mark.parametrize("dialect", ["4.x, float16 frequencies", "4.x, frequencies by layer", "asterisk"])
def test_stored_frequencies_are_used(dialect, tmp_path):
    """Stored frequencies are not recomputed: the first layer's are used, also if they were rounded to float16."""
    state = DIALECTS[dialect](torch_model().state_dict(), "esm.")
    stored = next(x for key, x in state.items() if key.endswith("inv_freq")).float().numpy()
    model = assert_loads_as_transformers(write(tmp_path, state), "ForMaskedLM")
    computed = MLXEsmForMaskedLM(model.config).esm.rotary_embeddings.inv_freq
    frequencies = model.esm.rotary_embeddings
    assert np.array_equal(np.array(frequencies.inv_freq.astype(mx.float32)), stored)
    assert not np.array_equal(np.array(computed), stored)
    logits = run(model)["logits"]
    frequencies.inv_freq = computed
    assert np.abs(run(model)["logits"] - logits).max() > 1e-5 * np.abs(logits).max()


# Round trip


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("kind", "dtype", "shard"),
    [
        ("esm2", "float32", "50GB"),
        ("esm2", "float16", SHARD),
        ("esm1b", "float32", SHARD),
        ("esm1b", "bfloat16", "50GB"),
    ],
)
def test_round_trip(kind, dtype, shard, task, tmp_path):
    """Theirs -> ours -> theirs -> ours keeps all bits and outputs, without warnings."""
    a, b, c = (tmp_path / name for name in "abc")
    torch_model(task, kind).to(getattr(torch, dtype)).save_pretrained(a, max_shard_size=shard)
    original = theirs(task).from_pretrained(a)
    model = ours(task).from_pretrained(a, dtype=dtype)
    model.save_pretrained(b, max_shard_size=shard)
    assert (len(list(b.iterdir())) > 2) == (shard == SHARD)

    with heard("transformers") as said:
        back, info = theirs(task).from_pretrained(b, output_loading_info=True)
    assert not said and not any(info.values())
    assert_same_state(back.state_dict(), original.state_dict())
    assert_close(run(back), run(original), tolerance=0)
    if dtype == "float32":
        assert_close(run(model), run(back))

    back.save_pretrained(c, max_shard_size=shard)
    assert bits(ours(task).from_pretrained(c, dtype=dtype)) == bits(model)


def test_without_pooler(tmp_path):
    model = MLXEsmModel.from_pretrained(write(tmp_path / "a", torch_model("Model").state_dict()))
    assert model.pooler is not None
    model = MLXEsmModel.from_pretrained(tmp_path / "a", add_pooling_layer=False)
    assert run(model).keys() == {"last_hidden_state"}
    model.save_pretrained(tmp_path / "b")
    with heard("transformers") as said:
        back = theirs("Model").from_pretrained(tmp_path / "b", add_pooling_layer=False)
    assert not said
    assert_close(run(model), run(back))


def test_transformers_logs_missing_heads(folder):
    """The round trip's check for warnings is effective: transformers logs a missing head."""
    with heard("transformers") as said:
        theirs("ForSequenceClassification").from_pretrained(folder)
    assert any("classifier.dense.weight" in message for message in said)


def test_saved_config(tmp_path):
    """The saved config is the loaded one, except for the dtype."""
    save(torch_model("ForTokenClassification", num_labels=3), tmp_path / "a")
    ours("ForTokenClassification").from_pretrained(tmp_path / "a").half().save_pretrained(tmp_path / "b")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert after == before | {"dtype": "float16"}
    assert after["architectures"] == ["EsmForTokenClassification"] and after["model_type"] == "esm"


def test_published_keys(folder, tmp_path):
    """Saved keys are those of the published repositories."""
    MLXEsmForMaskedLM.from_pretrained(folder).save_pretrained(tmp_path / "b")
    with open(tmp_path / "b" / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header.pop("__metadata__") == {"format": "pt"}
    published = layout_4x(torch_model().state_dict(), "esm.").keys()
    assert header.keys() == published - {"esm.embeddings.position_ids", "lm_head.decoder.weight"}


TRANSFORMERS_4 = """
import json, logging, sys, warnings
import torch, transformers

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
warnings.simplefilter("error")
inputs = {name: torch.tensor(x) for name, x in json.loads(sys.argv[1]).items()}
result = {"version": transformers.__version__}
for name in sys.argv[2:]:
    task, _, folder = name.partition(":")
    try:
        model, info = getattr(transformers, task).from_pretrained(folder or task, output_loading_info=True)
        with torch.no_grad():
            result[name] = {key: x.tolist() for key, x in model(**inputs).items()} | {"said": list(said)}
        info = [f"{kind}: {keys}" for kind, keys in info.items() if keys]
        result[name]["said"] += info
    except Exception as error:
        result[name] = {"error": f"{type(error).__name__}: {error}"}
    said.clear()
print(json.dumps(result))
"""


@pytest.mark.long
def test_transformers_4_loads_what_we_save(tmp_path):
    """What we save loads in transformers 4.x without warnings and gives equal outputs; ESM-1 is refused."""
    python = python_of_transformers_4(tmp_path)
    for kind in KINDS:
        models = {}
        for task in TASKS:
            save(torch_model(task, kind), tmp_path / "theirs")
            models[f"Esm{task}"] = model = ours(task).from_pretrained(tmp_path / "theirs")
            shutil.rmtree(tmp_path / "theirs")
            model.save_pretrained(tmp_path / kind / f"Esm{task}", max_shard_size=SHARD if task == "Model" else "5GB")
        control = "EsmForTokenClassification:EsmForMaskedLM"  # logs the missing head
        command = [python, "-c", TRANSFORMERS_4, json.dumps(INPUTS), *models, control]
        done = subprocess.run(command, cwd=tmp_path / kind, check=True, capture_output=True, text=True)
        result = json.loads(done.stdout)
        assert result.pop("version").startswith("4.")
        assert "classifier.weight" in str(result[control]["said"])
        for name, model in models.items():
            assert "error" not in result[name], result[name]
            assert result[name].pop("said") == []
            outputs = {key: torch.tensor(x) for key, x in result[name].items()}
            real = torch.tensor(INPUTS["attention_mask"], dtype=torch.bool)
            cut = {key: (x[real] if x.shape[:2] == real.shape else x).numpy() for key, x in outputs.items()}
            assert_close(run(model), cut)

    MLXEsmForMaskedLM(MLXEsm1Config(**SIZE)).save_pretrained(tmp_path / "esm1")
    results = refusals(tmp_path / "esm1", python)
    assert len(results) == 6 and [name for name, result in results.items() if result == "loaded"] == ["EsmConfig"]


# ESM-1


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("dtype", "shard"), [("float32", "50GB"), ("float16", SHARD)])
def test_esm1_round_trip(dtype, shard, task, tmp_path):
    model = as_loaded(ours(task)(MLXEsm1Config(**SIZE, num_labels=3))).eval().to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [f"MLXEsm{task}"]
    with heard("mlx_esm_hf") as said:
        back, info = ours(task).from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not said and not any(info.values())
    assert isinstance(back.config, MLXEsm1Config)
    changed = {"architectures": [f"MLXEsm{task}"], "dtype": dtype, "_name_or_path": str(tmp_path)}
    assert back.config.to_dict() == model.config.to_dict() | changed
    assert bits(back) == bits(model)
    assert_close(run(back), run(model), tolerance=0)


REFUSALS = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, EsmConfig, EsmForMaskedLM, EsmModel

for loader in (AutoConfig, AutoModel, AutoModelForMaskedLM, EsmConfig, EsmModel, EsmForMaskedLM):
    try:
        loader.from_pretrained(sys.argv[1])
        print(loader.__name__, "loaded")
    except Exception as error:
        print(loader.__name__, type(error).__name__)
"""


def refusals(folder, python=sys.executable):
    """Return {class of transformers: error or "loaded"} for a folder, in a process without our package."""
    done = subprocess.run([python, "-c", REFUSALS, folder], check=True, capture_output=True, text=True)
    return dict(line.split() for line in done.stdout.splitlines())


def test_transformers_refuses_esm1(tmp_path):
    """No class of transformers loads ESM-1, because it would compute something else from the same weights."""
    MLXEsmForMaskedLM(MLXEsm1Config(**SIZE)).save_pretrained(tmp_path)
    results = refusals(tmp_path)
    assert len(results) == 6 and "loaded" not in results.values()


# Bad input


def test_truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a complete safetensors file .* Download it"):
        MLXEsmForMaskedLM.from_pretrained(folder)


def test_truncated_bin(tmp_path):
    save_bin(torch_model(), tmp_path)
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: the file is damaged .* Download it again"):
        MLXEsmForMaskedLM.from_pretrained(tmp_path)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle(zipped, tmp_path):
    """Loading it fails and executes nothing; torch.load with weights_only=False executes it."""
    save_bin(torch_model(), tmp_path)
    path, marker = tmp_path / "pytorch_model.bin", tmp_path / "marker"
    state = torch_model().state_dict() | {"evil": Evil(marker)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: it holds the global 'posix.mkdir'.*Nothing .* exec"):
        MLXEsmForMaskedLM.from_pretrained(tmp_path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("place", ["../{}", "{folder}/../{}", "sub/{}", "..", ""])
def test_index_that_leaves_its_folder(place, tmp_path):
    """The index is refused even if the file exists and is valid."""
    folder = tmp_path / "esm2"
    save_shards(torch_model(), folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = min(index["weight_map"].values())
    (folder / "sub").mkdir()
    shutil.copy(folder / shard, tmp_path)
    shutil.copy(folder / shard, folder / "sub")
    moved = place.format(shard, folder=folder)
    index["weight_map"] = {k: moved if v == shard else v for k, v in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="index.json lists the shard .*, which is not in its folder") as error:
        MLXEsmForMaskedLM.from_pretrained(folder)
    assert repr(moved) in str(error.value)


@pytest.mark.parametrize("format", ["save_shards", "save_bin_shards"])
def test_missing_shard(format, tmp_path):
    FORMATS[format](torch_model(), tmp_path)
    shard = sorted(tmp_path.glob("*-of-*"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=f"does not appear to have a file named {shard.name}"):
        MLXEsmForMaskedLM.from_pretrained(tmp_path)


def test_unknown_keywords(folder):
    for name in ("foo", "output_attention"):
        with pytest.raises(TypeError, match=f"no argument '{name}', and the config has no such field"):
            MLXEsmForMaskedLM.from_pretrained(folder, **{name: True})
    with pytest.raises(TypeError, match="save_pretrained has no argument 'foo'"):
        MLXEsmForMaskedLM.from_pretrained(folder).save_pretrained(folder, foo=True)


def test_untrained_language_model_head(tmp_path):
    """A head that the checkpoint lacks cannot predict, but works with labels and after training or loading."""
    model = MLXEsmForMaskedLM.from_pretrained(write(tmp_path, torch_model("Model").state_dict()))
    with pytest.raises(
        ValueError, match=r"The checkpoint had no lm_head, so predicting residues .* train it .* or assign it"
    ):
        model(**INPUTS)
    model(**INPUTS, labels=INPUTS["input_ids"])
    loss, gradients = nn.value_and_grad(model, lambda: model(**INPUTS, labels=INPUTS["input_ids"]).loss)()
    assert np.isfinite(loss.item()) and mx.abs(gradients["lm_head"]["dense"]["weight"]).max() > 0
    model.train()
    model(**INPUTS)
    model.eval()
    model(**INPUTS)

    model = MLXEsmForMaskedLM.from_pretrained(tmp_path)
    model.load_state_dict(torch_model().state_dict())
    assert_close(run(model), run(torch_model()))


def test_untrained_contact_head(tmp_path):
    state = without("contact_head")(torch_model().state_dict(), "esm.")
    for task in ("ForMaskedLM", "Model"):
        model = ours(task).from_pretrained(write(tmp_path, state))
        for _ in range(2):
            with pytest.raises(
                ValueError, match="The checkpoint had no contact_head, so contact prediction would use random weights"
            ):
                model.predict_contacts(INPUTS["input_ids"], INPUTS["attention_mask"])
            model.train().eval()  # a contact head receives no gradient
        model.save_pretrained(tmp_path / task)
        reloaded = ours(task).from_pretrained(tmp_path / task)
        assert {name for name in reloaded.newly_initialized if "contact_head" in name}
    model = MLXEsmForMaskedLM.from_pretrained(write(tmp_path, torch_model().state_dict()))
    assert model.predict_contacts(INPUTS["input_ids"], INPUTS["attention_mask"]).shape == (2, 7, 7)


@pytest.mark.parametrize("task", ["Model", "ForMaskedLM", "ForSequenceClassification"])
def test_contact_head_of_a_new_model(task, tmp_path):
    """No training reaches it: it refuses, is not saved, and torch's transformers loads the folder without it."""
    model = ours(task)(config())
    for _ in range(2):
        with pytest.raises(ValueError, match="The contact_head of a new model is not trained.* or assign it"):
            model.base_model.predict_contacts(INPUTS["input_ids"], INPUTS["attention_mask"])
        model.save_pretrained(tmp_path)
        with safe_open(tmp_path / "model.safetensors", "np") as file:
            assert not [key for key in file.keys() if "contact_head" in key]  # noqa: SIM118
        model.train().eval()
    _, info = theirs(task).from_pretrained(tmp_path, output_loading_info=True)
    assert {key.rpartition(".")[0].removeprefix("esm.") for key in info["missing_keys"]} == {"contact_head.regression"}
    weights = [(name, x) for name, x in model.state_dict().items() if "contact_head" in name]
    model.load_weights(weights, strict=False)
    assert model.base_model.predict_contacts(INPUTS["input_ids"], None).shape == (2, 7, 7)
    model.save_pretrained(tmp_path)
    assert not ours(task).from_pretrained(tmp_path).newly_initialized


@pytest.mark.parametrize("how", ["untrained", "trainer", "own loop"])
def test_a_head_that_was_not_trained_is_not_saved(how, tmp_path):
    """What a checkpoint lacked is saved after training, with or without `train()`."""
    torch_model("Model").save_pretrained(tmp_path / "base")
    model = ours("ForSequenceClassification").from_pretrained(tmp_path / "base", num_labels=2)
    if how == "trainer":
        model.train()
    if how == "own loop":
        _, gradients = nn.value_and_grad(model, lambda model: model(**INPUTS).logits.sum())(model)
        SGD(0.1).update(model, gradients)
    model.save_pretrained(tmp_path / "saved")
    reloaded = ours("ForSequenceClassification").from_pretrained(tmp_path / "saved")
    assert any("classifier" in name for name in reloaded.newly_initialized) == (how == "untrained")
    assert not any("encoder" in name for name in reloaded.newly_initialized)


@pytest.mark.parametrize("previous", ["50GB", SHARD])
@pytest.mark.parametrize("shard", ["50GB", SHARD])
def test_full_disk(shard, previous, folder, tmp_path):
    """If a file cannot grow, saving fails with an error and leaves the previous files unchanged."""
    model = MLXEsmForMaskedLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "measured", max_shard_size=shard)
    largest = max(file.stat().st_size for file in (tmp_path / "measured").iterdir())
    target = tmp_path / "target"
    model.save_pretrained(target, max_shard_size=previous)
    before = {file.name: file.read_bytes() for file in target.iterdir()}

    model.lm_head.bias = model.lm_head.bias + 1
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, hard))  # Python ignores the signal for this limit
    try:
        with pytest.raises(OSError, match=r"model.*\.safetensors cannot be written .* Is the disk full\?"):
            model.save_pretrained(target, max_shard_size=shard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before


def test_saving_repeatedly_with_other_shards(folder, tmp_path):
    """Stale files of an earlier save are removed; other files stay."""
    model = MLXEsmForMaskedLM.from_pretrained(folder)
    others = {"README.md", "pytorch_model.bin", "model.old.safetensors", "model-00001-of-2.safetensors"}
    for name in others:
        (tmp_path / name).write_text("not ours")
    for size in (SHARD, "50KB", "50GB", SHARD):
        model.lm_head.bias = model.lm_head.bias + 1
        model.save_pretrained(tmp_path, max_shard_size=size)
        names = {file.name for file in tmp_path.iterdir() if file.is_file()} - others
        shards = {name for name in names if "-of-" in name}
        whole = {"config.json", "model.safetensors"}
        assert names == (shards | {"config.json", "model.safetensors.index.json"} if shards else whole)
        assert len({name.partition("-of-")[2] for name in shards}) <= 1
        assert bits(MLXEsmForMaskedLM.from_pretrained(tmp_path)) == bits(model)
    assert all((tmp_path / name).read_text() == "not ours" for name in others)


def test_only_safetensors_are_written(folder):
    model = MLXEsmForMaskedLM.from_pretrained(folder)
    model.save_pretrained(folder, safe_serialization=True)  # as in scripts for transformers 4
    with pytest.raises(ValueError, match="safe_serialization must be True"):
        model.save_pretrained(folder, safe_serialization=False)


# Options


def test_config_argument(tmp_path):
    """The config may be an object of ours or transformers', or a folder; it is copied and replaces the checkpoint's."""
    save(torch_model(kind="esm1b"), tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    plain = config("esm1b")
    plain.save_pretrained(tmp_path / "config")
    before = plain.to_dict()
    for given in (plain, MLXEsmConfig.from_dict(plain.to_dict()), tmp_path / "config", str(tmp_path / "config")):
        model = MLXEsmForMaskedLM.from_pretrained(tmp_path / "model", config=given, hidden_dropout_prob=0.5)
        assert_close(run(model), run(torch_model(kind="esm1b")))
        assert model.config.hidden_dropout_prob == 0.5
    assert plain.to_dict() == before


def test_config_overrides(folder):
    model = ours("ForSequenceClassification").from_pretrained(
        folder, num_labels=5, output_attentions=True, output_hidden_states=True, hidden_dropout_prob=0.5
    )
    output = model(**INPUTS)
    assert output.logits.shape == (2, 5) and model.config.num_labels == 5 and len(model.config.id2label) == 5
    assert len(output.attentions) == 3 and len(output.hidden_states) == 4
    assert model.classifier.dropout._p_1 == 0.5
    labels = {0: "cytosol", 1: "membrane"}
    model = ours("ForSequenceClassification").from_pretrained(folder, id2label=labels, return_dict=False)
    assert model.num_labels == 2 and isinstance(model(**INPUTS), tuple)


def test_ignored_arguments(folder):
    """They are accepted without a warning and do not change the config."""
    options = {
        "attn_implementation": "sdpa",
        "device_map": "auto",
        "low_cpu_mem_usage": True,
        "trust_remote_code": True,
    }
    with heard("mlx_esm_hf", "transformers") as said:
        model = MLXEsmForMaskedLM.from_pretrained(folder, **options)
    assert not said
    assert model.config.to_dict() == MLXEsmForMaskedLM.from_pretrained(folder).config.to_dict()
    assert not model.training


# Memory


LOAD_AND_RUN = r"""
import re, sys, time
library, folder = sys.argv[1:]
peak = lambda: int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024
tokens = [[0, 20, 15, 11, 5, 19, 7, 2]]
if library == "transformers":
    import torch
    from transformers import EsmForMaskedLM as Model
    forward = lambda model: model(torch.tensor(tokens)).logits.sum().item()
else:
    sys.modules["torch"] = None  # must not be imported
    from mlx_esm_hf import MLXEsmForMaskedLM as Model
    forward = lambda model: model(tokens).logits.sum().item()
before, start = peak(), time.perf_counter()
forward(Model.from_pretrained(folder, dtype="float32"))
print(peak() - before, time.perf_counter() - start)
"""


@needs_cpu
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux' /proc for the peak memory of a process"
)
@pytest.mark.parametrize(
    ("format", "dtype"), [("safetensors", "float32"), ("safetensors", "float16"), ("bin", "float32")]
)
@pytest.mark.parametrize(
    ("layers", "hidden", "heads"),
    [pytest.param(24, 512, 16, id="75M"), pytest.param(33, 1280, 20, id="650M", marks=pytest.mark.long)],
)
def test_memory_of_loading(layers, hidden, heads, format, dtype, tmp_path, capsys):
    """Loading in float32 and a forward pass of 8 tokens need little more memory than the weights."""
    shape = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": 4 * hidden}
    size = write_large(tmp_path, format, dtype, num_hidden_layers=layers, **shape)
    libraries = ["mlx_esm_hf", "transformers"] if layers == 33 else ["mlx_esm_hf"]
    added = {}
    for library in libraries:
        command = [sys.executable, "-c", LOAD_AND_RUN, library, tmp_path]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        added[library], seconds = map(float, done.stdout.split())
        with capsys.disabled():
            ratio = added[library] / size
            print(f"\n{library}, {dtype} .{format} of {size / 1e6:.0f} MB: {ratio:.3f} x, {seconds:.1f} s")
    assert added["mlx_esm_hf"] <= 1.15 * size


TIME_OF_LOADING = r"""
import sys, time
library, folder = sys.argv[1:]
if library == "transformers":
    from transformers import EsmForMaskedLM as Model
else:
    sys.modules["torch"] = None  # must not be imported
    from mlx_esm_hf import MLXEsmForMaskedLM as Model
start = time.perf_counter()
Model.from_pretrained(folder)
print(time.perf_counter() - start)
"""


@pytest.mark.long
@needs_kernels
def test_time_of_loading(tmp_path, capsys):
    """650M parameters in float32 load as fast as in transformers: shortest of five alternating runs."""
    write_large(tmp_path, "safetensors", "float32", num_hidden_layers=33, hidden_size=1280, num_attention_heads=20,
                intermediate_size=5120)  # fmt: skip
    seconds = {"mlx_esm_hf": [], "transformers": []}
    for _ in range(5):
        for library, times in seconds.items():
            command = [sys.executable, "-c", TIME_OF_LOADING, library, tmp_path]
            done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
            times.append(float(done.stdout))
    with capsys.disabled():
        print(f"\nloading 650M: {min(seconds['mlx_esm_hf']):.2f} s, transformers {min(seconds['transformers']):.2f} s")
    assert min(seconds["mlx_esm_hf"]) <= min(seconds["transformers"])


def test_lazy(folder):
    """Weights that are read only when they are needed give the same outputs."""
    model = MLXEsmForMaskedLM.from_pretrained(folder, lazy=True)
    assert_close(run(model), run(MLXEsmForMaskedLM.from_pretrained(folder)), tolerance=0)


def test_methods_of_torch_modules(folder):
    model = MLXEsmForMaskedLM.from_pretrained(folder, quantization_config=None, state_dict=None)
    assert mx.array_equal(model.forward(**INPUTS).logits, model(**INPUTS).logits)
    assert not model.can_generate() and not MLXEsmForMaskedLM.can_generate()
    assert model.requires_grad_(False) is model and model.num_parameters(only_trainable=True) == 0
    assert model.requires_grad_().num_parameters(only_trainable=True) == model.num_parameters()
    with pytest.raises(ValueError, match="Quantization for torch .quantization_config"):
        MLXEsmForMaskedLM.from_pretrained(folder, quantization_config={"load_in_8bit": True})
