"""A folder or repository that holds only an adapter loads as its base model with the adapter, as in transformers."""

import json
import shutil

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
import transformers

import mlx_esm_hf
from mlx_esm_hf import embed, fill_mask, load_protein_model, pipeline
from mlx_esm_hf.errors import CheckpointError
from mlx_esm_hf.models.auto import open_checkpoint
from mlx_esm_hf.training.adapters import LoraConfig, add_adapters, save_adapter
from tests.hub import Hub, serve, use
from tests.jobs.models import write_model
from tests.parity import batch, for_torch
from tests.training.adapters.helpers import close, randomize_adapters, set_in_config

SEQUENCE = "MKTAYIAKQR"


def write_adapter(place, head, **settings):
    """Write a base model with a tokenizer and an adapter of it, and return the adapted model of PEFT."""
    base = write_model(place / "base")
    cls = getattr(transformers, f"EsmFor{head}")
    options = {"num_labels": 3} if "Classification" in head else {}
    model = cls.from_pretrained(base, attn_implementation="eager", **options)
    lora = peft.LoraConfig(target_modules=["query", "value"], r=4, **settings)
    adapted = peft.get_peft_model(model, lora).eval()
    randomize_adapters(adapted)
    adapted.save_pretrained(place / "adapter")
    return adapted


@pytest.mark.parametrize("head", ["MaskedLM", "SequenceClassification", "TokenClassification"])
def test_outputs(tmp_path, head):
    """The number of labels is that of the adapter's classifier."""
    tasks = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}
    theirs = write_adapter(tmp_path, head, task_type=tasks.get(head))
    inputs = {"input_ids": batch("none")["input_ids"]}
    with torch.no_grad():
        wanted = theirs(**for_torch(inputs, theirs)).logits
    for cls in (f"MLXEsmFor{head}", f"MLXAutoModelFor{head}"):
        ours = getattr(mlx_esm_hf, cls).from_pretrained(tmp_path / "adapter")
        assert close(ours(**inputs).logits, wanted) and not ours.training
    assert f"MLXEsmFor{head}" == type(ours).__name__


def test_jobs_use_the_adapter(tmp_path):
    """Model and tokenizer are those of the base; the classifier is not needed."""
    write_adapter(tmp_path, "SequenceClassification", task_type="SEQ_CLS")
    folder, base = str(tmp_path / "adapter"), str(tmp_path / "base")
    model = mlx_esm_hf.MLXAutoModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    states = model(**tokenizer([SEQUENCE], return_tensors="np")).last_hidden_state[0, 1:-1]
    (result,) = embed([SEQUENCE], folder)
    assert close(result.arrays["mean"], states.mean(axis=0))
    (plain,) = embed([SEQUENCE], base)
    assert not np.allclose(plain.arrays["mean"], result.arrays["mean"], atol=1e-2)
    filled, without = (next(iter(fill_mask(["MK<mask>A"], place))).arrays["scores"] for place in (folder, base))
    assert not np.allclose(filled, without)
    loaded = load_protein_model(mlx_esm_hf.MLXAutoModel, folder)
    assert loaded.settings["weights"] != load_protein_model(mlx_esm_hf.MLXAutoModel, base).settings["weights"]


def test_pipelines(tmp_path):
    theirs = write_adapter(tmp_path, "SequenceClassification", task_type="SEQ_CLS")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        logits = theirs(**tokenizer(SEQUENCE, return_tensors="pt")).logits
    (found,) = pipeline("text-classification", str(tmp_path / "adapter"))(SEQUENCE)
    assert found["score"] == pytest.approx(logits.softmax(-1).max().item(), rel=1e-4)
    assert found["label"] == f"LABEL_{logits.argmax().item()}"


def test_label_names(tmp_path, caplog):
    """`save_adapter` writes the names of the labels and the kind of problem where PEFT and transformers ignore them."""
    base, folder = write_model(tmp_path / "base"), tmp_path / "adapter"
    names = {0: "helix", 1: "sheet", 2: "coil"}
    settings = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    settings |= {"problem_type": "multi_label_classification"}
    ours = mlx_esm_hf.MLXEsmForSequenceClassification.from_pretrained(base, **settings)
    add_adapters(ours, LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    save_adapter(ours, folder)
    ids = [[0, 5, 6, 7, 2]]
    wanted = ours.eval()(ids).logits

    again = mlx_esm_hf.MLXAutoModelForSequenceClassification.from_pretrained(folder)
    assert {name: getattr(again.config, name) for name in settings} == settings
    assert close(again(ids).logits, wanted)
    (found,) = pipeline("text-classification", str(folder), top_k=3)(SEQUENCE)
    assert {x["label"] for x in found} == {*names.values()}
    other = mlx_esm_hf.MLXEsmForSequenceClassification.from_pretrained(folder, id2label={0: "a", 1: "b", 2: "c"})
    assert other.config.id2label[0] == "a"

    model = transformers.EsmForSequenceClassification.from_pretrained(base, num_labels=3)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    for loaded in (peft.PeftModel.from_pretrained(model, folder), theirs):
        with torch.no_grad():
            assert close(loaded.eval()(torch.tensor(ids)).logits, wanted)
    assert "nexpected" not in caplog.text

    # PEFT has written an adapter with another number of labels into the same folder.
    (folder / "labels.json").write_text(json.dumps({"id2label": {0: "a", 1: "b"}}))
    assert mlx_esm_hf.MLXEsmForSequenceClassification.from_pretrained(folder).config.id2label[2] == "LABEL_2"
    for text, message in (("[", "is not JSON"), ('{"id2label": ["a"]}', "must contain `id2label`")):
        (folder / "labels.json").write_text(text)
        with pytest.raises(CheckpointError, match=rf"labels\.json {message}"):
            mlx_esm_hf.MLXEsmForSequenceClassification.from_pretrained(folder)


def test_a_language_model_has_no_labels(saved):
    assert not (saved / "labels.json").exists()


def test_repositories(tmp_path, monkeypatch):
    """Adapter and base are repositories; the adapter names a revision of the base. Afterwards both work offline."""
    write_adapter(tmp_path, "MaskedLM")
    set_in_config(tmp_path / "adapter", base_model_name_or_path="me/base", revision="v1")
    hub = Hub({("me/base", "v1"): tmp_path / "base", ("me/lora", "main"): tmp_path / "adapter"})
    ids = [[0, 5, 6, 7, 2]]
    expected = mlx_esm_hf.MLXEsmForMaskedLM.from_pretrained
    set_in_config(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"), revision=None)
    wanted = expected(tmp_path / "adapter")(ids).logits
    set_in_config(tmp_path / "adapter", base_model_name_or_path="me/base", revision="v1")
    with serve(hub) as endpoint:
        use(monkeypatch, endpoint)
        cache = {"cache_dir": tmp_path / "cache"}
        model = mlx_esm_hf.MLXAutoModelForMaskedLM.from_pretrained("me/lora", **cache)
        assert mx.array_equal(model(ids).logits, wanted)
        assert len(load_protein_model(mlx_esm_hf.MLXAutoModelForMaskedLM, "me/lora", **cache).tokenizer) == 33
    again = mlx_esm_hf.MLXEsmForMaskedLM.from_pretrained("me/lora", local_files_only=True, **cache)
    assert mx.array_equal(again(ids).logits, wanted)


def test_errors(tmp_path):
    write_adapter(tmp_path, "MaskedLM")
    folder = tmp_path / "adapter"
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(OSError, match=r"adapter is an adapter of .*base, which cannot be loaded .*load_adapter"):
        mlx_esm_hf.MLXEsmForMaskedLM.from_pretrained(folder)
    with pytest.raises(OSError, match=r"adapter is an adapter of .*base"):
        open_checkpoint(mlx_esm_hf.MLXAutoModelForMaskedLM, str(folder))
    set_in_config(folder, base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match=r"does not name its base model .*load_adapter"):
        mlx_esm_hf.MLXEsmForMaskedLM.from_pretrained(folder)


def test_an_adapter_is_not_published_as_a_model(tmp_path):
    """The message says what to do instead."""
    write_adapter(tmp_path, "MaskedLM")
    with pytest.raises(CheckpointError, match=r"holds an adapter without its base model.*merge_adapters.*hf upload"):
        mlx_esm_hf.hub.publish(tmp_path / "adapter", "me/adapter", token="hf_me", dry_run=True)
