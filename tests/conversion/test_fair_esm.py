"""Converting checkpoints of fair-esm, compared with its own loader and with transformers."""

import copy
import functools
import os
import re
import subprocess
import sys
from argparse import Namespace

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoTokenizer, EsmForMaskedLM
from transformers.models.esm.configuration_esm import get_default_vocab_list

from conversion import fair_esm
from conversion.fair_esm import convert, make_config
from mlx_esm_hf import MLXAutoModelForMaskedLM, MLXEsmForMaskedLM
from mlx_esm_hf.errors import CheckpointError
from tests.checkpoints import heard
from tests.conversion.checkpoints import (
    FAMILIES,
    PUBLISHED,
    build,
    file_names,
    load,
    published_by_fair_esm,
    save,
    settings_of,
)
from tests.parity import (
    MASK,
    Peers,
    answers,
    at_real_tokens,
    fair_esm_answers,
    hold,
    hold_all,
    randomize,
    true_float64,
)
from tests.processes import ENVIRONMENT, ROOT

PROTEINS = ("MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ", "KALTARQQEVFDLIRD", "MXBUZO.-W", "MKT<mask>YIAKQR<mask>ISF")


@functools.cache
def tiny(family):
    model = build(FAMILIES[family], layers=3, hidden_size=48, heads=4)
    randomize(model.eval(), seed=len(family))
    return model


class Converted:
    """A checkpoint, the converted folder, and the outputs of fair-esm."""

    def __init__(self, family, folder, format):
        self.path = save(tiny(family), folder / f"{FAMILIES[family]}.pt", format, regression=family != "ESM-1v")
        self.output = folder / "converted"
        convert(self.path, self.output)
        self.original, alphabet = load(self.path)
        self.tokens = alphabet.get_batch_converter()([("", protein) for protein in PROTEINS])[2].numpy()
        self.inputs = {"input_ids": self.tokens, "attention_mask": (self.tokens != alphabet.padding_idx).astype(int)}
        self.answers = fair_esm_answers(self.original, self.tokens)
        with true_float64():
            self.float64 = fair_esm_answers(copy.deepcopy(self.original).double(), self.tokens)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    @functools.cache
    def make(family, format="zip"):
        return Converted(family, tmp_path_factory.mktemp("converted"), format)

    return make


CASES = [("ESM-1", "zip"), ("ESM-1", "legacy"), ("ESM-1b", "zip"), ("ESM-1b", "legacy"), ("ESM-2", "zip")]


@pytest.mark.parametrize(("family", "format"), CASES)
def test_outputs(converted, family, format):
    """Logits, the states of every layer, attentions and contacts equal those of fair-esm."""
    case = converted(family, format)
    with heard("mlx_esm_hf") as said:
        model = MLXAutoModelForMaskedLM.from_pretrained(case.output)
    assert said == []
    peers = Peers(model, case.original, None)
    hold_all(peers, f"{family}, converted", case.inputs, case.answers, (", fair-esm", case.float64))


def test_outputs_without_a_contact_head(converted):
    case = converted("ESM-1v")
    with heard("mlx_esm_hf") as said:
        model = MLXAutoModelForMaskedLM.from_pretrained(case.output)
    assert said == []  # it refuses when it is used
    ours = answers(model, case.inputs, attentions=False)
    assert ours.keys() == {"logits", "hidden_states"}
    hold_layers("MLXEsmForMaskedLM, fair-esm", "ESM-1v, converted", case, ours)
    with pytest.raises(ValueError, match="The checkpoint had no contact_head"):
        model.predict_contacts(case.tokens, case.inputs["attention_mask"])


def hold_layers(model, family, case, theirs):
    real = case.inputs["attention_mask"].astype(bool)
    for name, layers in theirs.items():
        for values in zip(layers, case.answers[name], case.float64[name], strict=True):
            hold(model, name, family, *(at_real_tokens(name, value, real) for value in values))


@pytest.mark.parametrize("family", ["ESM-1b", "ESM-1v", "ESM-2"])
def test_transformers(converted, family):
    """Transformers loads the folder with equal outputs. It only warns about the missing contact head of ESM-1v."""
    case = converted(family)
    with heard("transformers") as said:
        model, info = EsmForMaskedLM.from_pretrained(case.output, attn_implementation="eager", output_loading_info=True)
        tokenizer = transformers.EsmTokenizer.from_pretrained(case.output)
    head = {"esm.contact_head.regression.weight", "esm.contact_head.regression.bias"}
    assert info["missing_keys"] == (head if family == "ESM-1v" else set())
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert len(said) == (family == "ESM-1v")
    assert tokenizer(list(PROTEINS), padding=True)["input_ids"] == case.tokens.tolist()
    theirs = answers(model, case.inputs)
    if family == "ESM-1v":
        del theirs["contacts"]
    hold_layers("EsmForMaskedLM, fair-esm", f"{family}, converted", case, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer(converted, family):
    case = converted(family)
    with heard("transformers") as said:
        tokenizer = AutoTokenizer.from_pretrained(case.output)
    assert said == []
    batch = tokenizer(list(PROTEINS), padding=True, return_tensors="np")
    assert (batch["input_ids"] == case.tokens).all()
    assert (batch["attention_mask"] == case.inputs["attention_mask"]).all()


def test_vocabulary_equals_that_of_fair_esm(converted):
    _, alphabet = load(converted("ESM-2").path)
    assert list(get_default_vocab_list()) == alphabet.all_toks
    assert (converted("ESM-2").output / "vocab.txt").read_text().split("\n") == alphabet.all_toks
    assert (alphabet.padding_idx, alphabet.mask_idx) == (fair_esm.PAD, fair_esm.MASK)


# Special cases of fair-esm's loader


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["ESM-1b", "ESM-2"])
def test_mask_embedding(tmp_path, family, tied):
    """The loader zeroes ESM-1b's row of <mask>, then loads the output projection if the file stores it separately."""
    model = copy.deepcopy(tiny(family))
    state = model.state_dict()
    if not tied:
        state["lm_head.weight"] = state["lm_head.weight"] * 1.5
    path = save(model, tmp_path / f"{FAMILIES[family]}.pt", more={"model": file_names(model, without_contacts(state))})
    original, _ = load(path)
    table = np.array(convert(path, tmp_path / "converted").get_input_embeddings().weight)
    assert (table == original.embed_tokens.weight.detach().numpy()).all()
    assert (table[MASK] == 0).all() == (family == "ESM-1b" and tied)


def without_contacts(state):
    return {key: tensor for key, tensor in state.items() if not key.startswith("contact_head.")}


def test_no_regression_file(tmp_path, capsys, monkeypatch):
    path = save(tiny("ESM-2"), tmp_path / "esm2_tiny.pt", regression=False)
    monkeypatch.setattr(sys, "argv", ["fair_esm.py", str(path), str(tmp_path / "converted")])
    fair_esm.main()
    missing = tmp_path / "esm2_tiny-contact-regression.pt"
    assert f"no contact head ({missing} not found)" in capsys.readouterr().out
    model = MLXEsmForMaskedLM.from_pretrained(tmp_path / "converted")
    assert {name.rpartition(".")[0] for name in model.newly_initialized} == {"esm.contact_head.regression"}


def test_half_precision(tmp_path):
    """Weights stay in half precision and the contact head in float32. Outputs in float32 equal those of fair-esm."""
    model = copy.deepcopy(tiny("ESM-2"))
    head = copy.deepcopy(model.contact_head)
    model.half().contact_head = head
    path = save(model, tmp_path / "esm2_tiny.pt")
    convert(path, tmp_path / "converted")
    with safe_open(tmp_path / "converted" / "model.safetensors", "numpy") as file:
        dtypes = {key: file.get_tensor(key).dtype.name for key in file.keys()}  # noqa: SIM118
    single = {key for key, dtype in dtypes.items() if dtype == "float32"}
    assert set(dtypes.values()) == {"float16", "float32"}
    assert all(key.startswith("esm.contact_head.") or key.endswith("inv_freq") for key in single)

    original, _ = load(path)
    case = Namespace(inputs={"input_ids": np.array([[0, 20, 15, 11, 5, 19, 12, 2]])})
    case.inputs["attention_mask"] = np.ones_like(case.inputs["input_ids"])
    ours = MLXEsmForMaskedLM.from_pretrained(tmp_path / "converted", dtype="float32")
    theirs = fair_esm_answers(original, case.inputs["input_ids"])
    with true_float64():
        float64 = fair_esm_answers(original.double(), case.inputs["input_ids"])
    hold_all(Peers(ours, original, None), "ESM-2, half, converted", case.inputs, theirs, (", fair-esm", float64))


# Configs and published sizes

# config.json of facebook/esm2_t6_8M_UR50D, without the fields that describe how it was written.
HUB_ESM2_8M = {
    "attention_probs_dropout_prob": 0.0,
    "emb_layer_norm_before": False,
    "esmfold_config": None,
    "hidden_dropout_prob": 0.0,
    "hidden_size": 320,
    "initializer_range": 0.02,
    "intermediate_size": 1280,
    "is_folding_model": False,
    "layer_norm_eps": 1e-05,
    "mask_token_id": 32,
    "max_position_embeddings": 1026,
    "model_type": "esm",
    "num_attention_heads": 20,
    "num_hidden_layers": 6,
    "pad_token_id": 1,
    "position_embedding_type": "rotary",
    "token_dropout": True,
    "use_cache": True,
    "vocab_list": None,
    "vocab_size": 33,
}


def on_meta(name):
    """Return fair-esm's model of a published size, without allocating its weights."""
    with torch.device("meta"):
        return build(name, *PUBLISHED[name])


def plain(settings):
    """Return settings with namespaces as dictionaries, as our reader returns them."""
    if isinstance(settings, Namespace):
        settings = vars(settings)
    return {k: plain(v) if isinstance(v, dict | Namespace) else v for k, v in settings.items()}


def config_of(model):
    return make_config(plain(settings_of(model)), lazy_state(model))


def lazy_state(model):
    """Return lazy arrays with the shapes of its parameters, which are never computed."""
    return {key: mx.zeros(tuple(tensor.shape)) for key, tensor in model.state_dict().items()}


def test_config_equals_that_on_the_hub():
    config = config_of(on_meta("esm2_t6_8M_UR50D")).to_dict()
    assert {name: config[name] for name in HUB_ESM2_8M} == HUB_ESM2_8M


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("esm1b_t33_650M_UR50S", {"emb_layer_norm_before": True, "position_embedding_type": "absolute"}),
        ("esm1v_t33_650M_UR90S_1", {"emb_layer_norm_before": False, "position_embedding_type": "absolute"}),
        ("esm2_t33_650M_UR50D", {"emb_layer_norm_before": False, "position_embedding_type": "rotary"}),
    ],
)
def test_config_of_650m(name, expected):
    size = {"hidden_size": 1280, "num_hidden_layers": 33, "intermediate_size": 5120}
    expected = {**HUB_ESM2_8M, **size, **expected}
    config = config_of(on_meta(name)).to_dict()
    assert {field: config[field] for field in expected} == expected


def test_all_models_of_fair_esm_are_covered():
    assert set(PUBLISHED) == published_by_fair_esm()


@pytest.mark.parametrize("name", PUBLISHED)
def test_layout(name):
    """Each parameter of a published size fits our model by name and shape. Checking it allocates no memory."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    theirs = on_meta(name)
    model = MLXEsmForMaskedLM(config_of(theirs))
    model.load_state_dict(lazy_state(theirs))  # raises on missing or unexpected names and on other shapes
    assert mx.get_peak_memory() - before < 1 << 20
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert model.num_parameters() == count
    size = re.search(r"_(\d+)([MB])_", name)
    assert count == pytest.approx(int(size[1]) * {"M": 1e6, "B": 1e9}[size[2]], rel=0.1)
    (row,) = re.findall(rf"^\| `{name}` \|.*$", (ROOT / "docs" / "converting.md").read_text(encoding="utf-8"), re.M)
    assert f"| {count / 1e6:,.1f} M |" in row


# Invalid and malicious files


class TouchesFile:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class SettingsThatAct(Namespace):
    """An object with its own `__setstate__`."""

    def __setstate__(self, state):
        os.system(f"touch {state['path']}")


EVILS = {
    "beside the model": lambda marker: {"extra": TouchesFile(marker)},
    "in the model": lambda marker: {"model": {"encoder.embed_tokens.weight": TouchesFile(marker)}},
    "the model": lambda marker: {"model": TouchesFile(marker)},
    "in a namespace": lambda marker: {"cfg": {"model": Namespace(encoder_layers=TouchesFile(marker))}},
    "the namespace": lambda marker: {"cfg": {"model": TouchesFile(marker)}},
    "deep in namespaces": lambda marker: {"args": Namespace(a=[{"b": Namespace(c=(TouchesFile(marker),))}])},
    "a namespace with __setstate__": lambda marker: {"cfg": {"model": SettingsThatAct(path=marker)}},
}


@pytest.mark.parametrize("format", ["zip", "legacy"])
@pytest.mark.parametrize("evil", EVILS)
def test_malicious_checkpoint(tmp_path, evil, format):
    marker, output = tmp_path / "marker", tmp_path / "converted"
    path = save(tiny("ESM-2"), tmp_path / "esm2_evil.pt", format, more=EVILS[evil](marker))
    with pytest.raises(
        CheckpointError, match=r"esm2_evil\.pt: it holds the global '.*Nothing in the file was executed"
    ):
        convert(path, output)
    assert not marker.exists() and not output.exists()
    torch.load(path, weights_only=False)  # the attack works with torch
    assert marker.exists()


def test_malicious_regression_file(tmp_path):
    path, marker = save(tiny("ESM-2"), tmp_path / "esm2_tiny.pt"), tmp_path / "marker"
    torch.save({"model": {}, "evil": TouchesFile(marker)}, tmp_path / "esm2_tiny-contact-regression.pt")
    with pytest.raises(CheckpointError, match=r"esm2_tiny-contact-regression\.pt: it holds the global"):
        convert(path, tmp_path / "converted")
    assert not marker.exists() and not (tmp_path / "converted").exists()


SETTINGS = {"encoder_layers": 0, "encoder_embed_dim": 4, "encoder_attention_heads": 1, "token_dropout": True}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"args": Namespace(arch="msa_transformer")}, "its architecture is 'msa_transformer'"),
        ({"args": Namespace(arch="roberta_large")}, "it lacks 'ffn_embed_dim'"),
        ({"args": Namespace()}, "it lacks 'arch'"),
        ({"args": 3}, "not subscriptable"),
        ({"cfg": {}}, "it lacks 'model'"),
        ({"cfg": {"model": SETTINGS | {"encoder_embed_dim": "wide"}}}, "hidden_size"),
        ({}, "it lacks 'args'"),
        (
            {"cfg": {"model": SETTINGS | {"encoder_layers": 10**9}}},
            r"1000000000 layers and embeddings of shape \(33, 4\), but its weights have 0",
        ),
        (
            {"cfg": {"model": SETTINGS | {"encoder_embed_dim": 5}}},
            r"of shape \(33, 5\), but its weights have 0 layers and embeddings of shape \(33, 4\)",
        ),
    ],
    ids=str,
)
def test_invalid_settings_are_refused(tmp_path, settings, message):
    path = tmp_path / "x.pt"
    torch.save({"model": {"embed_tokens.weight": torch.ones(33, 4)}, **settings}, path)
    with pytest.raises(CheckpointError, match=rf"x\.pt is not a checkpoint of .*{message}"):
        convert(path, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"model": {"weight": torch.ones(2)}, "cfg": {"model": SETTINGS}}, path)
    with pytest.raises(CheckpointError, match="it lacks 'embed_tokens.weight'"):
        convert(path, tmp_path / "converted")
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="not a training checkpoint with a 'model'"):
        convert(path, tmp_path / "converted")


def test_missing_parameters_and_wrong_shapes_are_refused(tmp_path):
    model = tiny("ESM-2")
    state = file_names(model, without_contacts(model.state_dict()))
    bias = "encoder.sentence_encoder.layers.1.fc1.bias"
    for wrong, message in (
        ({key: x for key, x in state.items() if key != bias}, "missing keys: esm.encoder.layer.1.intermediate.dense"),
        ({**state, bias: state[bias][1:]}, r"layer.1.intermediate.dense.bias: \(191,\) in the checkpoint"),
        ({**state, "encoder.version": torch.ones(1)}, "unexpected keys: version"),
    ):
        path = save(model, tmp_path / "esm2_tiny.pt", more={"model": wrong})
        with pytest.raises(CheckpointError, match=rf"esm2_tiny\.pt: (.|\n)*{message}"):
            convert(path, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_script(tmp_path):
    """The script runs as documented, without torch."""
    path = save(tiny("ESM-2"), tmp_path / "esm2_tiny.pt")
    without_torch = (
        "import runpy, sys\n"
        "sys.modules['torch'] = None\n"
        "del sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", without_torch, "conversion/fair_esm.py", path, tmp_path / "converted"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    count = sum(parameter.numel() for parameter in tiny("ESM-2").parameters())
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'converted'}: {count:,} parameters, float32\n"
    expected = {"config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt"}
    assert {file.name for file in (tmp_path / "converted").iterdir()} == expected


def test_error_of_the_script(tmp_path, monkeypatch):
    path = save(tiny("ESM-2"), tmp_path / "esm2_tiny.pt")
    path.write_bytes(path.read_bytes()[:-100])
    monkeypatch.setattr(sys, "argv", ["fair_esm.py", str(path), str(tmp_path / "converted")])
    with pytest.raises(SystemExit, match=r"error: .*esm2_tiny\.pt: the file is damaged"):
        fair_esm.main()
