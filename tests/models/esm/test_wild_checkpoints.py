"""Checkpoints with the configs and vocabularies of public repositories agree with transformers."""

import json

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoTokenizer, EsmTokenizer

import mlx_esm_hf
from mlx_esm_hf import (
    MLXAutoModelForMaskedLM,
    MLXEsmcModel,
    MLXEsmConfig,
    MLXEsmForMaskedLM,
    MLXEsmModel,
    convert,
    load_protein_model,
)
from mlx_esm_hf.data.vocabulary import refuse_other_tokenizer
from mlx_esm_hf.ops import kernels
from tests.parity import answers, hold_all, one_thread, true_float64
from tests.wild import WILD, wild_peers, write_wild


@pytest.fixture(autouse=True)
def quick():
    with one_thread():
        yield


def inputs_of(folder, name):
    """Return the tokenizer's batch for the sequences of a checkpoint, and labels: classes, or half of the tokens."""
    batch = AutoTokenizer.from_pretrained(folder)(list(WILD[name].sequences), padding=True, return_tensors="np")
    labels = np.where(
        np.arange(batch["input_ids"].size).reshape(batch["input_ids"].shape) % 2, -100, batch["input_ids"]
    )
    labels[batch["attention_mask"] == 0] = -100
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if WILD[name].task == "Model":
        return inputs
    return inputs | {"labels": np.array([1, 0]) if WILD[name].task == "ForSequenceClassification" else labels}


@pytest.mark.parametrize("name", WILD)
def test_agrees_with_transformers(tmp_path, name):
    """Hidden states, logits, attentions, contacts and the loss are within the bar."""
    task = WILD[name].task
    model = wild_peers(tmp_path, name, getattr(mlx_esm_hf, f"MLXAutoModel{task.removeprefix('Model')}"))
    inputs = inputs_of(tmp_path, name)
    with true_float64():
        exact = answers(model.float64, inputs)
    hold_all(model, name, inputs, answers(model.torch, inputs), ("", exact))


@pytest.mark.parametrize("eos", [None, 5, [2, 5]])
def test_contact_head_reads_token_2_as_eos(tmp_path, eos):
    """Transformers' contact head takes token 2 for <eos>, whatever the config says."""
    torch_model = write_wild(tmp_path, "ChatterjeeLab/PepMLM")
    model = MLXEsmForMaskedLM.from_pretrained(tmp_path, eos_token_id=eos)
    ids = np.array([[0, 20, 5, 6, 7, 5, 2], [0, 8, 9, 2, 1, 1, 1]])
    mask = (ids != 1).astype(int)
    expected = torch_model.predict_contacts(torch.tensor(ids), torch.tensor(mask)).detach().numpy()
    found = np.array(model.predict_contacts(ids, mask))
    assert found.shape == expected.shape and np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("name", WILD)
def test_tokenizer_belongs_to_the_model(tmp_path, name, recwarn):
    """More tokens than embeddings, no <eos> and no single residues are fine if no sequence has such a token."""
    write_wild(tmp_path, name)
    config = MLXEsmConfig.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    refuse_other_tokenizer(tokenizer, config, MLXEsmModel.residues, name)
    assert not [w for w in recwarn if "other ids" in str(w.message)]
    assert max(map(max, tokenizer(list(WILD[name].sequences))["input_ids"])) < config.vocab_size


@pytest.mark.parametrize("token", ["J", "<eos>", "ACGTAC"])
def test_tokenizer_with_a_token_outside_the_table(tmp_path, token):
    """A token that sequences have, or that the tokenizer adds, needs an embedding."""
    tokens = [t for t in WILD["facebook/esm1v"].vocabulary if t != token] + [token]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    config = MLXEsmConfig(
        vocab_size=len(tokens) - 1, pad_token_id=1, mask_token_id=tokens.index("<mask>"), eos_token_id=None
    )
    with pytest.raises(ValueError, match=f"has {len(tokens)} tokens, the model {len(tokens) - 1}.* {token}"):
        refuse_other_tokenizer(EsmTokenizer(str(tmp_path / "vocab.txt")), config, {}, "toy")


# Networks that only look like ESM

REFUSED = {
    "InstaDeepAI/nucleotide-transformer-v2-50m-multi-species": (
        {**WILD["nucleotide-transformer-500m"].config, "add_bias_fnn": False, "vocab_size": 4107},
        "another network than ESM: a Nucleotide Transformer v2",
    ),
    "zhangtaolab/plant-nucleotide-transformer-BPE": (
        {"add_bias_fnn": False, "auto_map": {"AutoConfig": "esm_config.EsmConfig"}, "vocab_size": 8000},
        "another network than ESM: a Nucleotide Transformer v2",
    ),
    "without model_type, with code": (
        {"auto_map": {"AutoConfig": "model.OtherConfig"}, "vocab_size": 33},
        "config.json without model_type, and code of its own",
    ),
    "Synthyra/ESMplusplus_small": (
        {"model_type": "ESMplusplus", "vocab_size": 64, "auto_map": {"AutoConfig": "modeling_esm_plusplus.Config"}},
        "'ESMplusplus'.* is ESMC with other parameter names. Use the original weights, such as biohub/ESMC-300M",
    ),
    "nvidia/esm2_t6_8M_UR50D": (
        {
            **WILD["ChatterjeeLab/PepMLM"].config,
            "model_type": "nv_esm",
            "auto_map": {"AutoConfig": "esm_nv.NVEsmConfig"},
        },
        "'nv_esm'.* TransformerEngine.* Use Meta's original",
    ),
    "biohub/ESMC-600M-sae": ({"model_type": "esmc_sae"}, "'esmc_sae'.* no language model. Load the ESMC here"),
    "chandar-lab/AMPLIFY_120M": ({"model_type": "AMPLIFY"}, "is AMPLIFY, a network with another feed-forward"),
    "biohub/ESMC-300M": (
        {"d_model": 960, "n_heads": 15, "n_layers": 30, "tokenizer_class": "ESMCTokenizer"},
        "has the config of the esm package.*conversion/esmc.py",
    ),
}


@pytest.mark.parametrize("cls", [MLXAutoModelForMaskedLM, MLXEsmForMaskedLM, MLXEsmcModel])
@pytest.mark.parametrize("name", REFUSED)
def test_other_networks_are_refused(tmp_path, name, cls):
    """The error comes before the weights are looked for, which this folder lacks."""
    config, message = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        cls.from_pretrained(tmp_path)
    if cls is MLXAutoModelForMaskedLM:
        with pytest.raises(ValueError, match=message):
            load_protein_model(cls, str(tmp_path))


def test_without_model_type(tmp_path):
    """Its class loads it, as in transformers. An Auto class says which one to use."""
    write_wild(tmp_path, "ChatterjeeLab/PepMLM")
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert MLXEsmForMaskedLM.from_pretrained(tmp_path).config.model_type == "esm"
    with pytest.raises(
        ValueError, match="has no model_type. Load it with the class of its family, such as MLXEsmModel"
    ):
        MLXAutoModelForMaskedLM.from_pretrained(tmp_path)


# FastPLMs


@pytest.mark.parametrize("head", ["", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"])
def test_fast_esm_is_saved_as_esm(tmp_path, head):
    """Each head loads it, transformers loads what is saved, and no code of the repository is run or referred to."""
    (tmp_path / "fast").mkdir()
    torch_model = write_wild(tmp_path / "fast", "Synthyra/ESM2")
    (tmp_path / "fast" / "modeling_fastesm.py").write_text("raise SystemExit('executed')")
    auto = getattr(mlx_esm_hf, f"MLXAutoModel{head}")
    model = auto.from_pretrained(tmp_path / "fast", trust_remote_code=True)
    assert type(model) is getattr(mlx_esm_hf, f"MLXEsm{head or 'Model'}")
    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["model_type"] == "esm" and "auto_map" not in written
    assert written["architectures"] == [f"Esm{head or 'Model'}"]
    cls = getattr(transformers, f"AutoModel{head}")
    loaded = cls.from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
    ids = torch.tensor([[0, 20, 5, 32, 7, 2]])
    with torch.no_grad():
        states = [m(ids, output_hidden_states=True).hidden_states[-1] for m in (loaded, torch_model)]
    assert torch.equal(*states)


def test_jobs_run_fast_esm(tmp_path, monkeypatch):
    """Nothing asks whether to trust the code of the repository."""
    write_wild(tmp_path, "Synthyra/ESM2")
    (tmp_path / "modeling_fastesm.py").write_text("raise SystemExit('executed')")
    special = {"tokenizer_class": "EsmTokenizer", "auto_map": {"AutoTokenizer": ["modeling_fastesm.Tokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(special))
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(prompt))
    (result,) = mlx_esm_hf.embed(["MKTAYIAK"], str(tmp_path))
    assert result.arrays["mean"].shape == (32,)


# Saving and converting


@pytest.mark.parametrize("name", WILD)
def test_converted_checkpoint_loads_in_transformers(tmp_path, name):
    """`mlx-esm convert` keeps config and vocabulary, so transformers computes the same bits from the result."""
    (tmp_path / "wild").mkdir()
    torch_model = write_wild(tmp_path / "wild", name)
    convert(tmp_path / "wild", tmp_path / "converted")
    cls = type(torch_model)
    loaded = cls.from_pretrained(tmp_path / "converted", attn_implementation="eager").eval()
    inputs = inputs_of(tmp_path / "wild", name)
    ids, mask = (torch.tensor(inputs[key]) for key in ("input_ids", "attention_mask"))
    with torch.no_grad():
        found, expected = (m(ids, mask, output_hidden_states=True) for m in (loaded, torch_model))
    assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
    if "logits" in expected:
        assert torch.equal(found.logits, expected.logits)
    before, after = (AutoTokenizer.from_pretrained(tmp_path / place) for place in ("wild", "converted"))
    assert after.get_vocab() == before.get_vocab() and after.eos_token == before.eos_token
    text = list(WILD[name].sequences)
    assert after(text)["input_ids"] == before(text)["input_ids"]
    defaults = {"dtype", "architectures", "transformers_version", "model_type"}
    kept = {k: v for k, v in torch_model.config.to_dict().items() if k not in defaults and not k.startswith("_")}
    written = loaded.config.to_dict()
    assert {k: written[k] for k in kept if k in written} == {k: v for k, v in kept.items() if k in written}


# What single repositories are special for


@pytest.mark.parametrize("kernel", ["none", *(kernels.native.instruction_sets() if kernels.native else [])])
def test_head_size_75(tmp_path, monkeypatch, kernel):
    """AgroNT's heads are no multiple of any vector; each kernel, and MLX without kernels, computes the same."""
    model = wild_peers(tmp_path, "agro-nucleotide-transformer-1b")
    assert model.mlx.config.hidden_size // model.mlx.config.num_attention_heads == 75
    inputs = inputs_of(tmp_path, "agro-nucleotide-transformer-1b")
    with true_float64():
        exact = answers(model.float64, inputs)
    before = kernels.native and kernels.native.instruction_set()
    try:
        if kernel == "none":
            monkeypatch.setattr(kernels, "native", None)
        else:
            kernels.native.choose(kernel)
        hold_all(model, f"AgroNT, {kernel}", inputs, answers(model.torch, inputs), ("", exact))
    finally:
        if kernel != "none":
            kernels.native.choose(before)


def test_files_are_special(tmp_path):
    """The tests above read what the repositories have: duplicate keys, int64 position ids and matrices by columns."""
    write_wild(tmp_path, "nucleotide-transformer-500m")
    text = (tmp_path / "config.json").read_text()
    assert text.count('"pad_token_id"') == 3 and text.count('"vocab_size"') == 2
    model = MLXEsmForMaskedLM.from_pretrained(tmp_path)
    assert (model.config.pad_token_id, model.config.vocab_size, model.config.layer_norm_eps) == (1, 4105, 1e-12)
    assert not model.is_tied() and not np.array_equal(*untied(model))
    write_wild(tmp_path, "nucleotide-transformer-2.5b")
    state = torch.load(tmp_path / "pytorch_model.bin")
    assert state["esm.embeddings.position_ids"].dtype == torch.int64
    assert state["lm_head.dense.weight"].stride() == (1, 32)


def untied(model):
    return np.array(model.lm_head.decoder.weight), np.array(model.esm.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("name", ["nucleotide-transformer-500m", "facebook/esm-1b", "Synthyra/ESM2", "airkingbd/dplm"])
def test_saved_again(tmp_path, name):
    """A loaded checkpoint, saved and loaded, gives the same bits, and keeps its special fields."""
    (tmp_path / "wild").mkdir()
    write_wild(tmp_path / "wild", name)
    first = MLXEsmForMaskedLM.from_pretrained(tmp_path / "wild")
    first.save_pretrained(tmp_path / "saved")
    again, info = MLXEsmForMaskedLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    ids = np.array([[3, 20, 5, 2, 7, 9]])
    assert np.array_equal(np.array(first(ids).logits), np.array(again(ids).logits))
    for field in ("mask_token_id", "token_dropout", "emb_layer_norm_before", "tie_word_embeddings", "layer_norm_eps"):
        assert getattr(again.config, field) == getattr(first.config, field)


def test_dropout_of_dplm(tmp_path):
    """hidden_dropout 0.1 is for training only."""
    write_wild(tmp_path, "airkingbd/dplm")
    model, ids = MLXEsmForMaskedLM.from_pretrained(tmp_path), np.array([[0, 20, 5, 32, 7, 2]])
    assert model.config.hidden_dropout_prob == 0.1 and not model.config.tie_word_embeddings
    assert np.array_equal(np.array(model(ids).logits), np.array(model(ids).logits))
    model.train()
    assert not np.array_equal(np.array(model(ids).logits), np.array(model(ids).logits))


def test_last_token_without_eos(tmp_path):
    """Without <eos>, the special tokens mask of transformers' tokenizer has one entry more than there are tokens."""
    write_wild(tmp_path, "nucleotide-transformer-500m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("ATTCCGATTCCG", return_special_tokens_mask=True)
    assert len(ids["input_ids"]) == 3 and ids["special_tokens_mask"] == [1, 0, 0, 1]
    finished = tokenizer.get_special_tokens_mask(ids["input_ids"], already_has_special_tokens=True)
    assert finished == [1, 0, 0]


def test_tokenizer_without_a_mask(tmp_path):
    """Jobs that predict tokens say what is missing before the weights are read. Embedding needs no mask."""
    write_wild(tmp_path, "hf-internal-testing/tiny-random-EsmForMaskedLM")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "EsmTokenizer", "mask_token": null}')
    (result,) = mlx_esm_hf.embed(["MKT"], str(tmp_path))
    assert np.isfinite(result.arrays["mean"]).all()
    (tmp_path / "model.safetensors").unlink()
    for job in (mlx_esm_hf.fill_mask, mlx_esm_hf.perplexity):
        with pytest.raises(ValueError, match="The tokenizer of .* has no mask token, which predicting tokens needs"):
            job(["MK<mask>T"], str(tmp_path))


def test_subfolder(tmp_path):
    """ProTrek has its language models in subfolders."""
    (tmp_path / "foldseek").mkdir()
    torch_model = write_wild(tmp_path / "foldseek", "ProTrek-foldseek")
    model = MLXAutoModelForMaskedLM.from_pretrained(tmp_path, subfolder="foldseek")
    ids = AutoTokenizer.from_pretrained(tmp_path, subfolder="foldseek")("dvvlpc")["input_ids"]
    expected = torch_model(torch.tensor([ids])).logits.detach().numpy()
    assert np.abs(np.array(model(np.array([ids])).logits) - expected).max() < 1e-4
