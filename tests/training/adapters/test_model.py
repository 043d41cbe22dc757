"""Adapters in a model, with PEFT as the reference: the same A, B and W give the same outputs and gradients."""

from typing import Any

import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import peft
import pytest
import torch
import transformers
from mlx.utils import tree_flatten

from mlx_esm_hf.modeling_layers import Linear, QuantizedLinear
from mlx_esm_hf.training.adapters import (
    LoraConfig,
    LoRALinear,
    add_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
)
from tests.parity import HEADS, batch, for_torch, hold, true_float64
from tests.training.adapters.helpers import (
    KINDS,
    MODELS,
    TARGETS,
    base_model,
    close,
    hold_outputs,
    logits,
    mlx_gradients,
    our_base,
    our_base_with,
    our_name,
    peers,
    randomize_adapters,
    shapes_of,
    torch_gradients,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "head"), MODELS)
def test_outputs(backend, tmp_path, family, head, kind):
    model = peers(tmp_path, family, head, **KINDS[kind])
    assert not close(logits(model.mlx, head), logits(our_base(tmp_path / "base", head), head), 0.1)
    hold_outputs(model, family, batch(head=head))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "head"), MODELS)
def test_gradients(backend, tmp_path, family, head, kind):
    """A, B, the magnitudes and the modules to save have the gradients of torch; nothing else has any."""
    model, inputs = peers(tmp_path, family, head, **KINDS[kind]), batch(head=head)
    ours, theirs = mlx_gradients(model.mlx, inputs), torch_gradients(model.torch, inputs)
    with true_float64():
        float64 = torch_gradients(model.float64, inputs)
    assert ours.keys() == theirs.keys() and any("lora_A" in name for name in ours)
    assert any("magnitude" in name for name in ours) == (kind == "DoRA")
    assert any("classifier" in name for name in ours) == (head != "lm")
    # Errors are relative to the largest gradient, since small gradients are computed from numbers of that size.
    scale = max(np.abs(gradient).max() for gradient in float64.values())
    for name in theirs:
        trio = ours[name], theirs[name], float64[name]
        hold(type(model.mlx).__name__, "gradients", f"{family} {name}", *trio, scale=scale)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*layer\.[01]\.attention\.self\.(query|key)"},
        {"target_modules": ["esm.encoder.layer.1.attention.self.value", "intermediate.dense"]},
        {"rank_pattern": {"value": 2, r"layer\.1\.output\.dense": 7}, "alpha_pattern": {"query": 3}},
        {"use_rslora": True, "rank_pattern": {"dense": 9}},
        {"modules_to_save": ["emb_layer_norm_after", "contact_head"]},
        {"target_modules": "all-linear"},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"bias": "all", "use_dora": True},
        {"layers_to_transform": 1},
        {"layers_to_transform": [0, 1], "layers_pattern": ["layer"]},
        {"exclude_modules": ["attention.output.dense", "key"], "target_modules": "all-linear"},
        {"exclude_modules": r".*layer\.0\..*"},
    ],
    ids=str,
)
def test_settings(tmp_path, settings):
    """`add_adapters` creates the same adapters from a config as PEFT, and PEFT's file loads."""
    model = peers(tmp_path, "ESM-2", "lm", **settings)
    hold_outputs(model, "ESM-2", batch(head="lm"))
    ours = add_adapters(our_base(tmp_path / "base", "lm"), LoraConfig(**{"r": 4, "target_modules": TARGETS} | settings))
    save_adapter(ours, tmp_path / "ours")
    assert shapes_of(tmp_path / "ours") == shapes_of(tmp_path / "adapter")
    theirs = {our_name(name) for name, p in model.torch.named_parameters() if p.requires_grad}
    assert dict(tree_flatten(ours.trainable_parameters())).keys() == theirs
    again = peft.PeftModel.from_pretrained(base_model(tmp_path / "base", "ESM-2", "lm"), tmp_path / "ours")
    assert again.get_nb_trainable_parameters()[1] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_initialization(tmp_path, kind):
    """New adapters do not change the outputs, and A has the same distribution as in PEFT."""
    model = base_model(tmp_path / "base", "ESM-2", "lm")
    ours = our_base(tmp_path / "base", "lm")
    before = logits(ours)
    add_adapters(ours, LoraConfig(r=64, target_modules=TARGETS, **KINDS[kind]))
    assert np.array_equal(logits(ours), before)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=64, target_modules=TARGETS, **KINDS[kind]))
    found = {our_name(n): p.detach().numpy() for n, p in theirs.base_model.model.named_parameters() if p.requires_grad}
    assert found.keys() == dict(tree_flatten(ours.trainable_parameters())).keys()
    for name, array in tree_flatten(ours.trainable_parameters()):
        if "lora_A" in name:
            bound = array.shape[1] ** -0.5
            assert 0.95 * bound < np.abs(array).max() <= bound >= np.abs(found[name]).max()
            assert abs(np.array(array).std() - found[name].std()) < 0.1 * bound
        else:
            assert np.allclose(array, found[name])


def test_biases_of_modules_to_save(tmp_path):
    """PEFT writes them twice."""
    settings = {"bias": "all", "modules_to_save": ["emb_layer_norm_after"]}
    hold_outputs(peers(tmp_path, "ESM-2", "lm", **settings), "ESM-2", batch(head="lm"))
    assert any(name.endswith("modules_to_save.bias") for name in shapes_of(tmp_path / "adapter"))


@pytest.mark.parametrize("initialization", ["gaussian", False])
def test_other_initializations(tmp_path, initialization):
    """A and B have PEFT's distributions."""
    settings = {"r": 64, "target_modules": TARGETS, "init_lora_weights": initialization}
    theirs = peft.get_peft_model(base_model(tmp_path / "base", "ESM-2", "lm"), peft.LoraConfig(**settings))
    ours = add_adapters(our_base(tmp_path / "base", "lm"), peft.LoraConfig(**settings))
    found = {our_name(n): p.detach().numpy() for n, p in theirs.base_model.model.named_parameters() if p.requires_grad}
    trainable = dict(tree_flatten(ours.trainable_parameters()))
    assert found.keys() == trainable.keys()
    for name, array in trainable.items():
        assert np.array(array).std() == pytest.approx(found[name].std(), rel=0.1), name
        assert np.abs(array).max() == pytest.approx(np.abs(found[name]).max(), rel=0.3), name


def test_print_trainable_parameters(tmp_path, capsys):
    """The line is PEFT's."""
    model = peft.get_peft_model(base_model(tmp_path / "base", "ESM-2", "lm"), peft.LoraConfig(target_modules=TARGETS))
    model.print_trainable_parameters()
    ours = add_adapters(our_base(tmp_path / "base", "lm"), LoraConfig(target_modules=TARGETS))
    ours.print_trainable_parameters()
    theirs, line = capsys.readouterr().out.splitlines()
    assert line == theirs and ours.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


VOCABULARY = ["word_embeddings", "lm_head", "decoder", "lm_head.decoder", "dense"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "settings",
    [
        *({"modules_to_save": [name]} for name in VOCABULARY),
        {"modules_to_save": ["word_embeddings", "decoder"]},
        {"modules_to_save": ["word_embeddings", "lm_head"]},
        {"target_modules": ["query", "decoder"]},
        {"target_modules": ["query", "decoder"], "use_dora": True},
        {"target_modules": ["query", "decoder"], "modules_to_save": ["word_embeddings"]},
        {"target_modules": ["query", "lm_head.dense"], "modules_to_save": ["decoder"]},
        {"target_modules": "all-linear", "modules_to_save": ["word_embeddings"]},
    ],
    ids=str,
)
def test_embedding_and_head(tmp_path, settings, tied):
    """Trained embeddings and output projections have PEFT's meaning, in both directions and after merging."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["query"]} | settings
    theirs = peft.get_peft_model(
        base_model(tmp_path / "base", "ESM-2", "lm", tie_word_embeddings=tied), peft.LoraConfig(**settings)
    ).eval()
    randomize_adapters(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    inputs = batch("none", head="lm")
    with torch.no_grad():
        wanted = theirs(**for_torch(inputs, theirs)).logits

    ours = load_adapter(our_base(tmp_path / "base", "lm"), tmp_path / "adapter")
    assert close(ours(**inputs).logits, wanted)
    save_adapter(ours, tmp_path / "ours")
    assert shapes_of(tmp_path / "ours") == shapes_of(tmp_path / "adapter")
    base = transformers.EsmForMaskedLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        assert close(again(**for_torch(inputs, again)).logits, wanted)

    new = add_adapters(our_base(tmp_path / "base", "lm"), LoraConfig(**settings))
    names = {our_name(name) for name, p in theirs.base_model.model.named_parameters() if p.requires_grad}
    assert dict(tree_flatten(new.trainable_parameters())).keys() == names
    assert close(new.eval()(**inputs).logits, our_base(tmp_path / "base", "lm")(**inputs).logits)

    merge_adapters(ours).save_pretrained(tmp_path / "merged")
    merged = transformers.EsmForMaskedLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    with torch.no_grad():
        assert close(merged(**for_torch(inputs, merged)).logits, wanted)
    assert close(our_base(tmp_path / "merged", "lm")(**inputs).logits, wanted)


def test_tied_adapters_are_refused(tmp_path):
    """The model stays tied."""
    base_model(tmp_path / "base", "ESM-2", "lm")
    model = our_base(tmp_path / "base", "lm")
    with pytest.raises(ValueError, match="ensure_weight_tying=True is not supported"):
        add_adapters(model, LoraConfig(modules_to_save=["word_embeddings"], ensure_weight_tying=True))
    assert model.is_tied() and model.config.tie_word_embeddings
    add_adapters(model, LoraConfig(ensure_weight_tying=True))
    assert model.is_tied()


@pytest.mark.parametrize("kind", KINDS)
def test_trainable_parameters(tmp_path, kind):
    """Adapters and head are trainable, as many parameters as in PEFT. Adapters have the model's mode."""
    theirs = base_model(tmp_path / "base", "ESM-2", "token")
    settings = {"r": 5, "target_modules": TARGETS, "task_type": "TOKEN_CLS", **KINDS[kind]}
    ours = add_adapters(our_base(tmp_path / "base", "token"), LoraConfig(**settings))
    trainable = dict(tree_flatten(ours.trainable_parameters()))
    assert {name.rpartition(".")[0] for name in trainable if "lora_" not in name} == {"classifier"}
    count, _ = peft.get_peft_model(theirs, peft.LoraConfig(**settings)).get_nb_trainable_parameters()
    assert ours.num_parameters(only_trainable=True) == count
    assert not any(module.training for _, module in ours.named_modules())
    merge_adapters(ours.train())
    assert all(module.training for _, module in ours.named_modules())
    assert {name for name, _ in tree_flatten(ours.trainable_parameters())} == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "head"), MODELS)
def test_merged(backend, tmp_path, family, head, kind):
    """A merged model has the same outputs and no adapters, and torch loads it."""
    model = peers(tmp_path, family, head, **KINDS[kind])
    before = logits(model.mlx, head)
    merge_adapters(model.mlx)
    assert close(logits(model.mlx, head), before)
    kinds = {type(module) for name, module in model.mlx.named_modules() if name.endswith(tuple(TARGETS))}
    assert kinds == {Linear}
    model.mlx.save_pretrained(tmp_path / "merged")
    theirs = getattr(transformers, f"Esm{HEADS[head][0]}").from_pretrained(tmp_path / "merged").eval()
    inputs = for_torch(batch(head=head), theirs)
    with torch.no_grad():
        real = Ellipsis if head == "single_label" else batch(head=head)["attention_mask"].astype(bool)
        wanted = model.torch(**inputs).logits[real]
        assert close(theirs(**inputs).logits[real], wanted) and close(before[real], wanted)


def quantize(model: Any, bits: int = 8) -> Any:
    nn.quantize(model, 32, bits, class_predicate=lambda name, m: "encoder" in name and isinstance(m, Linear))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_base(tmp_path, kind):
    """Adapters of a quantized model are trained, saved, loaded and merged."""
    base_model(tmp_path / "base", "ESM-2", "single_label")
    model = quantize(our_base(tmp_path / "base", "single_label"))
    config = LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["classifier"], **KINDS[kind])
    add_adapters(model, config).train()
    held = dict(model.named_modules())
    assert all(type(module.base_layer) is QuantizedLinear for module in held.values() if isinstance(module, LoRALinear))
    inputs, optimizer = batch(head="single_label"), optim.Adam(2e-3)
    losses = []
    for _ in range(25):
        loss, gradients = nn.value_and_grad(model, lambda: model(**inputs).loss)()
        assert all("lora_" in name or "classifier" in name for name, _ in tree_flatten(gradients))
        optimizer.update(model, gradients)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]

    save_adapter(model, tmp_path / "adapter")
    reloaded = load_adapter(quantize(our_base(tmp_path / "base", "single_label")), tmp_path / "adapter")
    trained = logits(model.eval(), "single_label")
    assert np.array_equal(logits(reloaded, "single_label"), trained)
    merge_adapters(reloaded)
    layer = reloaded.esm.encoder.layer[0].attention.self
    assert type(layer.query) is Linear and type(layer.key) is QuantizedLinear
    assert close(logits(reloaded, "single_label"), trained)


def test_a_quantized_head_cannot_be_trained(tmp_path):
    base_model(tmp_path / "base", "ESM-2", "single_label")
    model = our_base(tmp_path / "base", "single_label")
    nn.quantize(model.classifier, 32, 8, class_predicate=lambda name, m: name == "dense")
    with pytest.raises(ValueError, match="classifier.dense is quantized and cannot be trained"):
        add_adapters(model, LoraConfig(task_type="SEQ_CLS"))


def test_a_model_with_adapters_is_not_saved_as_a_checkpoint(tmp_path):
    model = our_base_with(tmp_path, LoraConfig())
    with pytest.raises(ValueError, match=r"self.value has an adapter, .*save_adapter.*merge_adapters"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_model_has_adapters_at_most_once(saved):
    """Saving and merging need adapters; adding and loading need a model without."""
    model = our_base(saved.parent / "base", "lm")
    for use in (merge_adapters, lambda model: save_adapter(model, saved)):
        with pytest.raises(ValueError, match="MLXEsmForMaskedLM has no adapters"):
            use(model)
    load_adapter(model, saved)
    for add in (lambda: load_adapter(model, saved), lambda: add_adapters(model, LoraConfig())):
        with pytest.raises(ValueError, match="MLXEsmForMaskedLM already has adapters: merge them"):
            add()
