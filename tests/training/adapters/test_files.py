"""Adapter files, written by PEFT and read here, and the other way around."""

import copy
from typing import Any

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import save_file

import mlx_esm_hf
from mlx_esm_hf.modeling_layers import Linear
from mlx_esm_hf.training.adapters import (
    LoraConfig,
    LoRALinear,
    add_adapters,
    files,
    load_adapter,
    merge_adapters,
    save_adapter,
)
from tests import hub
from tests.models.test_third_family import ToyConfig, ToyModel
from tests.parity import HEADS, batch, for_torch
from tests.training.adapters.helpers import (
    KINDS,
    MODELS,
    TARGETS,
    arrays_of,
    assert_refused,
    base_model,
    close,
    config_of,
    logits,
    our_base,
    our_base_with,
    peers,
    randomize_adapters,
    shapes_of,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "head"), MODELS)
def test_files(tmp_path, family, head, kind):
    """PEFT writes, we read and write, PEFT reads: keys, arrays, settings and outputs stay the same."""
    model = peers(tmp_path, family, head, lora_dropout=0.1, **KINDS[kind])
    save_adapter(model.mlx, tmp_path / "ours")
    theirs, ours = arrays_of(tmp_path / "adapter"), arrays_of(tmp_path / "ours")
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert any("classifier" in name for name in ours) == (head != "lm")

    settings = [peft.LoraConfig.from_pretrained(tmp_path / name).to_dict() for name in ("adapter", "ours")]
    for setting in settings:
        del setting["base_model_name_or_path"], setting["auto_mapping"], setting["peft_version"]
        setting["target_modules"] = sorted(setting["target_modules"])
    assert settings[0] == settings[1]
    assert config_of(tmp_path / "ours")["base_model_name_or_path"] == str(tmp_path / "base")

    base = getattr(transformers, f"Esm{HEADS[head][0]}").from_pretrained(tmp_path / "base").eval()
    base.set_attn_implementation("eager")
    reloaded = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    inputs = for_torch(batch(head=head), base)
    with torch.no_grad():
        assert torch.equal(reloaded(**inputs).logits, model.torch(**inputs).logits)


def test_torch_bin(tmp_path):
    model = peers(tmp_path, "ESM-2", "lm")
    state = {name: torch.tensor(array) for name, array in arrays_of(tmp_path / "adapter").items()}
    torch.save(state, tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    reloaded = load_adapter(our_base(tmp_path / "base", "lm"), tmp_path / "adapter")
    assert np.array_equal(logits(reloaded), logits(model.mlx))


def test_a_head_in_the_adapter_file(tmp_path):
    """A base model without a head gets it from the adapter, and the head is no longer reported as new."""
    model = peers(tmp_path, "ESM-2", "token")
    base_model(tmp_path / "lm", "ESM-2", "lm")
    ours, info = mlx_esm_hf.MLXEsmForTokenClassification.from_pretrained(
        tmp_path / "base", output_loading_info=True, num_labels=3
    )
    body = {name: array for name, array in ours.state_dict().items() if not name.startswith("classifier")}
    ours = mlx_esm_hf.MLXEsmForTokenClassification.from_pretrained(tmp_path / "base", state_dict=body)
    assert ours.newly_initialized == {"classifier.weight", "classifier.bias"}
    load_adapter(ours, tmp_path / "adapter")
    assert not ours.newly_initialized and np.array_equal(logits(ours, "token"), logits(model.mlx, "token"))


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["word_embeddings"]}], ids=["frozen", "trained"])
def test_a_resized_vocabulary(tmp_path, settings):
    """PEFT writes the tables of a vocabulary that was resized. Loading resizes the model."""
    base_model(tmp_path / "base", "ESM-2", "single_label")
    base = transformers.EsmForSequenceClassification.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(40)
    lora = peft.LoraConfig(target_modules=TARGETS, task_type="SEQ_CLS", **settings)
    model = peft.get_peft_model(base, lora).eval()
    randomize_adapters(model)
    model.save_pretrained(tmp_path / "adapter")
    assert any("word_embeddings" in name for name in shapes_of(tmp_path / "adapter"))
    ours = load_adapter(our_base(tmp_path / "base", "single_label"), tmp_path / "adapter")
    assert ours.config.vocab_size == 40
    inputs = batch("none", head="single_label")
    inputs["input_ids"][:, 3] = 39
    with torch.no_grad():
        assert close(ours(**inputs).logits, model(**for_torch(inputs, model)).logits)


def test_a_resized_vocabulary_of_a_language_model(tmp_path):
    base_model(tmp_path / "base", "ESM-2", "lm")
    ours = our_base(tmp_path / "base", "lm")
    ours.resize_token_embeddings(40)
    add_adapters(ours, LoraConfig(target_modules=["query"], modules_to_save=["word_embeddings"]))
    save_adapter(ours, tmp_path / "adapter")
    again = load_adapter(our_base(tmp_path / "base", "lm"), tmp_path / "adapter")
    ids = [[0, 5, 39, 6, 2]]
    assert close(again(ids).logits[..., :33], ours.eval()(ids).logits[..., :33])


def test_another_family(tmp_path):
    """Files and target_modules use the names of the model's first dialect."""
    mx.random.seed(0)
    model = ToyModel(ToyConfig())
    add_adapters(model, LoraConfig(target_modules=["h.0"], r=2))
    assert type(model.blocks[0]) is LoRALinear and type(model.blocks[1]) is Linear
    model.blocks[0].lora_B.weight = mx.random.normal((8, 2))
    save_adapter(model, tmp_path)
    assert arrays_of(tmp_path).keys() == {f"base_model.model.h.0.lora_{part}.weight" for part in "AB"}
    reloaded = ToyModel(ToyConfig())
    reloaded.update(merge_adapters(copy.deepcopy(model)).parameters())
    ids = mx.array([[5, 6, 7, 8]])
    assert close(reloaded(ids).last_hidden_state, model(ids).last_hidden_state)
    mx.random.seed(0)
    loaded = load_adapter(ToyModel(ToyConfig()), tmp_path)
    assert np.array_equal(loaded(ids).last_hidden_state, model(ids).last_hidden_state)


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    model = our_base_with(tmp_path, LoraConfig())
    save_adapter(model, tmp_path / "adapter")
    before = {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()}
    model.esm.encoder.layer[0].attention.self.query.lora_B.weight *= 2

    def fail(*args: Any, **kwargs: Any) -> str:
        raise OSError("no space left")

    monkeypatch.setattr(files.json, "dumps", fail)  # called after the weights are written
    with pytest.raises(OSError, match="no space left"):
        save_adapter(model, tmp_path / "adapter")
    assert {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()} == before


def test_weights_that_are_refused(saved):
    arrays = arrays_of(saved)
    first = min(arrays)
    save_file({**arrays, first: arrays[first].astype(np.int32)}, saved / "adapter_model.safetensors")
    assert_refused(saved, "got mlx.core.int32 of shape")
    save_file({name: array for name, array in arrays.items() if name != first}, saved / "adapter_model.safetensors")
    assert_refused(saved, "missing 1 of the adapter's arrays")
    (saved / "adapter_model.safetensors").write_bytes(b"cut off")
    assert_refused(saved, "safetensors file")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_is_missing(saved, name):
    (saved / name).unlink()
    with pytest.raises(OSError, match=f"{name} (or .*)?not found in"):
        load_adapter(our_base(saved.parent / "base", "lm"), saved)


def test_from_the_hub(saved, tmp_path, monkeypatch):
    """Load a revision from the Hub, then from the cache; a repository without an adapter is an error."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    local = load_adapter(our_base(tmp_path / "base", "lm"), saved)
    with hub.serve(hub.Hub({("me/adapter", "v1"): saved, ("me/adapter", "main"): tmp_path / "base"})) as endpoint:
        hub.use(monkeypatch, endpoint)
        model = load_adapter(our_base(tmp_path / "base", "lm"), "me/adapter", revision="v1")
        assert np.array_equal(logits(model), logits(local))
        with pytest.raises(OSError, match="adapter_config.json not found in me/adapter"):
            load_adapter(our_base(tmp_path / "base", "lm"), "me/adapter")
        with pytest.raises(OSError, match="has no repository me/other"):
            load_adapter(our_base(tmp_path / "base", "lm"), "me/other")
    reloaded = load_adapter(our_base(tmp_path / "base", "lm"), "me/adapter", revision="v1", local_files_only=True)
    assert np.array_equal(logits(reloaded), logits(local))
