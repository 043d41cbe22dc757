"""Small calls of transformers and torch that scripts make."""

from __future__ import annotations

import pathlib
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers

import mlx_esm_hf
from mlx_esm_hf import (
    MLXEsmConfig,
    MLXEsmForMaskedLM,
    MLXEsmForSequenceClassification,
    MLXEsmForTokenClassification,
    MLXEsmModel,
    demo_model,
)
from tests.models.esmc import peers as esmc
from tests.models.esmfold.folding import peers as folding_peers
from tests.parity import config
from tests.tiny import tiny, tiny_folding

IDS = mx.array([[0, 5, 6, 7, 2]])


@pytest.fixture(scope="module")
def model() -> MLXEsmForMaskedLM:
    return MLXEsmForMaskedLM.from_pretrained(demo_model())


def all_models() -> list[Any]:
    classes = (MLXEsmModel, MLXEsmForMaskedLM, MLXEsmForSequenceClassification, MLXEsmForTokenClassification)
    of_esmc = (getattr(mlx_esm_hf, name.replace("Esm", "Esmc")) for name in (cls.__name__ for cls in classes))
    models = [cls(MLXEsmConfig(**tiny("ESM-2"))) for cls in classes]
    return models + [cls(mlx_esm_hf.MLXEsmcConfig(**esmc.config().to_dict())) for cls in of_esmc]


def test_arguments_without_effect() -> None:
    for model in all_models():
        plain = model.train()(IDS, return_dict=False)
        model.eval()
        ignored = {"use_cache": False, "token_type_ids": None, "past_key_values": None, "head_mask": None}
        if "labels" in type(model).__call__.__annotations__ and hasattr(model, "lm_head"):
            model.train()
        found = model(IDS, return_dict=False, **ignored)
        assert isinstance(found, tuple) and found[0].shape == plain[0].shape
        with pytest.raises(TypeError, match="no argument 'nonsense'"):
            model(IDS, nonsense=1)
        with pytest.raises(TypeError, match="no argument 'head_mask'"):
            model(IDS, head_mask=mx.ones(3))


def test_loading_options_without_effect(model: MLXEsmForMaskedLM) -> None:
    options = {"weights_only": True, "max_memory": {0: "1GB"}, "offload_folder": "x", "proxies": {}, "use_cache": False}
    options |= {"resume_download": True, "offload_state_dict": False, "device_map": "auto", "load_in_8bit": False}
    again = MLXEsmForMaskedLM.from_pretrained(demo_model(), **options)
    assert mx.array_equal(again(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match=r"load_in_8bit.*not supported. Quantize the checkpoint"):
        MLXEsmForMaskedLM.from_pretrained(demo_model(), load_in_8bit=True)
    with pytest.raises(TypeError, match="no argument 'nonsense'"):
        MLXEsmForMaskedLM.from_pretrained(demo_model(), nonsense=1)


def test_key_mapping(tmp_path: pathlib.Path, model: MLXEsmForMaskedLM) -> None:
    """Regular expressions rename the keys, as in transformers."""
    torch.manual_seed(0)
    theirs = transformers.EsmForMaskedLM(config("ESM-2")).eval()
    mapping = {r"^backbone\.": "esm.", r"blocks": "encoder.layer"}
    state = {key.replace("encoder.layer", "blocks").replace("esm.", "backbone.", 1): x.contiguous()
             for key, x in theirs.state_dict().items() if "decoder" not in key}  # fmt: skip
    theirs.config.save_pretrained(tmp_path)
    from safetensors.torch import save_file

    save_file({key: x.clone() for key, x in state.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="embeddings"):
        MLXEsmForMaskedLM.from_pretrained(tmp_path)
    ours = MLXEsmForMaskedLM.from_pretrained(tmp_path, key_mapping=mapping)
    again = transformers.EsmForMaskedLM.from_pretrained(tmp_path, key_mapping=mapping).eval()
    with torch.no_grad():
        expected = again(torch.tensor(np.array(IDS))).logits.numpy()
    np.testing.assert_allclose(np.array(ours(IDS).logits), expected, atol=1e-5)


def test_resizing_without_means() -> None:
    """As in transformers, new rows are then normal with `initializer_range`."""
    for tied in (True, False):
        model = MLXEsmForMaskedLM(MLXEsmConfig(**tiny("ESM-2", tie_word_embeddings=tied, initializer_range=0.5)))
        old = model.get_input_embeddings().weight
        table = model.resize_token_embeddings(233, mean_resizing=False).weight
        assert mx.array_equal(table[:33], old) and table[33:].std().item() == pytest.approx(0.5, rel=0.1)
        assert tied or model.lm_head.decoder.weight[33:].std().item() == pytest.approx(0.5, rel=0.1)
        mean = model.resize_token_embeddings(240).weight
        assert mx.allclose(mean[-1], table.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("width", [16, 64])
def test_resizing_with_means(tmp_path: pathlib.Path, width: int) -> None:
    """The noise of transformers is 1e-9 times the covariance, which it can draw only if the width is below 33."""
    torch.manual_seed(0)
    settings = tiny("ESM-2", hidden_size=width, initializer_range=0.5)
    transformers.EsmForMaskedLM(transformers.EsmConfig(**settings)).save_pretrained(tmp_path)
    theirs = transformers.EsmForMaskedLM.from_pretrained(tmp_path).resize_token_embeddings(2033).weight.detach().numpy()
    ours = np.array(MLXEsmForMaskedLM.from_pretrained(tmp_path).resize_token_embeddings(2033).weight)
    assert np.array_equal(ours[:33], theirs[:33])
    noise = (theirs - ours)[33:].astype(np.float64)
    if width == 64:
        np.testing.assert_allclose(noise, 0, atol=1e-7)
    else:
        np.testing.assert_allclose(noise.std(axis=0), np.sqrt(1e-9) * theirs[:33].std(axis=0), rtol=0.1)
        np.testing.assert_allclose(noise.mean(axis=0), 0, atol=2e-6)


def test_attributes(tmp_path: pathlib.Path) -> None:
    theirs = transformers.EsmForMaskedLM(config("ESM-2"))
    theirs.save_pretrained(tmp_path)
    ours, theirs = MLXEsmForMaskedLM.from_pretrained(tmp_path), transformers.EsmForMaskedLM.from_pretrained(tmp_path)
    assert ours.main_input_name == theirs.main_input_name
    assert ours.name_or_path == theirs.name_or_path == str(tmp_path)
    assert ours.get_memory_footprint() == ours.get_memory_footprint(False) + sum(
        x.nbytes for _, x in ours.named_buffers()
    )
    assert ours.get_memory_footprint(return_buffers=False) == theirs.get_memory_footprint(return_buffers=False)
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in theirs.named_buffers() if "inv" in name][
        :1
    ]
    assert {name for name, _ in ours.named_children()} == {name for name, _ in theirs.named_children()}
    path = "esm.encoder.layer.1.attention.self.query"
    assert ours.get_submodule(path) is ours.esm.encoder.layer[1].attention.self.query
    assert ours.get_parameter(f"{path}.weight").shape == tuple(theirs.get_parameter(f"{path}.weight").shape)
    with pytest.raises(AttributeError, match="nothing"):
        ours.get_submodule("esm.nothing")
    assert theirs.resize_token_embeddings(40).weight.shape[0] == theirs.vocab_size  # set by this call
    assert ours.resize_token_embeddings(40).weight.shape[0] == ours.vocab_size
    for name in ("enable_input_require_grads", "disable_input_require_grads", "post_init"):
        assert getattr(ours, name)() is None
    new = MLXEsmForMaskedLM._from_config(ours.config, dtype="bfloat16", attn_implementation="eager")
    assert new.dtype == mx.bfloat16


def test_activation_checkpointing() -> None:
    """The names of transformers 5.24 and the older ones both work."""
    folding = mlx_esm_hf.MLXEsmForProteinFolding(MLXEsmConfig(**tiny_folding()))
    for model in [*all_models(), folding]:
        assert model.supports_gradient_checkpointing and not model.is_activation_checkpointing
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        assert model.is_activation_checkpointing and model.is_gradient_checkpointing
        model.gradient_checkpointing_disable()
        assert not model.is_activation_checkpointing
        model.gradient_checkpointing_enable()
        assert model.is_activation_checkpointing
        model.activation_checkpointing_disable()
        assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("multiple", [1.3, 0, True])
def test_sizes_are_padded_to_integers(multiple: Any) -> None:
    model = MLXEsmModel(MLXEsmConfig(**tiny("ESM-2")))
    with pytest.raises(ValueError, match="pad_to_multiple_of must be an integer"):
        model.resize_token_embeddings(40, pad_to_multiple_of=multiple)


def test_arguments_without_effect_in_folding() -> None:
    model = mlx_esm_hf.MLXEsmForProteinFolding(MLXEsmConfig(**tiny_folding())).eval()
    ids = mx.array([[0, 1, 2, 3]])
    found = model(ids, num_recycles=0, output_hidden_states=True, use_cache=False, token_type_ids=None)
    assert mx.array_equal(found.positions, model(ids, num_recycles=0).positions)
    with pytest.raises(TypeError, match="no argument 'nonsense'"):
        model(ids, nonsense=1)


def test_parts_can_be_frozen() -> None:
    """Scripts freeze the first layers, and list what is left."""
    for model in all_models():
        encoder = model.base_model.encoder.layer if hasattr(model.base_model, "encoder") else model.base_model.layers
        model.unfreeze()
        total = model.num_parameters(only_trainable=True)
        frozen = sum(x.size for _, x in encoder[0].named_parameters())
        assert encoder[0].requires_grad_(False) is encoder[0]
        assert frozen and model.num_parameters(only_trainable=True) == total - frozen
        encoder[0].requires_grad_(True)
        assert model.num_parameters(only_trainable=True) == total


def test_moves_of_folding_scripts(tmp_path: pathlib.Path) -> None:
    """Casts and devices as in public folding notebooks."""
    model = folding_peers(tmp_path).ours
    for move in (
        lambda m: m.to("cuda"),
        lambda m: m.cuda(),
        lambda m: m.eval().cuda(),
        lambda m: m.cpu(),
        lambda m: m.float(),
        lambda m: m.to(torch.device("cpu")),
        lambda m: m.to("cuda:0", torch.float32),
    ):
        assert move(model) is model and model.dtype == mx.float32
    assert model.bfloat16().dtype == mx.bfloat16
    assert model.to(device="cuda", dtype=torch.float32).dtype == mx.float32
    model.esm = model.esm.half()
    assert model.esm.dtype == mx.float16 and model.dtype == mx.float32
    model.trunk.set_chunk_size(64)
    with pytest.raises(ValueError, match="The folding trunk cannot be float16"):
        model.half()
