"""A new family needs 30 lines and no change of the package."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from huggingface_hub.dataclasses import strict
from safetensors.numpy import load_file, save_file
from transformers import EsmTokenizer, PreTrainedConfig

from mlx_esm_hf import MLXAutoModel, MLXAutoModelForMaskedLM, embed, ops
from mlx_esm_hf.checkpoint.names import Dialect
from mlx_esm_hf.errors import CheckpointError
from mlx_esm_hf.modeling_inputs import Tables, check_inputs
from mlx_esm_hf.modeling_layers import Linear
from mlx_esm_hf.modeling_outputs import MLXBaseModelOutput
from mlx_esm_hf.modeling_utils import MLXPreTrainedModel
from tests.vocabulary import write_vocabulary


@strict
class ToyConfig(PreTrainedConfig):
    model_type = "toy"
    vocab_size: int = 33
    hidden_size: int = 8
    num_hidden_layers: int = 2
    pad_token_id: int = 1


class ToyModel(MLXPreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "toy"
    dialects = (Dialect((("wte.{rest}", "table.{rest}"), ("h.{layer}.{rest}", "blocks.{layer}.{rest}"))),)
    buffers = ("decay",)
    required = ("blocks.",)
    input_embeddings = "table"

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = [Linear(config.hidden_size, config.hidden_size) for _ in range(config.num_hidden_layers)]
        self.decay = mx.array([0.5])

    def __call__(self, input_ids, attention_mask=None, output_hidden_states=False):
        config = self.config
        tables = Tables(config.vocab_size, config.hidden_size, config.pad_token_id)
        states = [self.table(check_inputs(input_ids, attention_mask, None, None, tables).input_ids)]
        for block in self.blocks:
            states.append(block(states[-1], activation="gelu", residual=states[-1] * self.decay))
        return MLXBaseModelOutput(last_hidden_state=states[-1], hidden_states=tuple(states))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A saved model whose family is registered with MLXAutoModel."""
    monkeypatch.setattr(MLXAutoModel, "models", dict(MLXAutoModel.models))
    MLXAutoModel.register(ToyConfig, ToyModel)
    mx.random.seed(0)
    ToyModel(ToyConfig()).save_pretrained(tmp_path)
    EsmTokenizer(write_vocabulary(tmp_path)).save_pretrained(tmp_path)
    return tmp_path


def test_keys_and_bits(folder):
    """The model is saved with the keys of its dialect and loaded with identical bits."""
    mx.random.seed(0)
    state = ToyModel(ToyConfig()).state_dict()
    written = load_file(folder / "model.safetensors")
    assert written.keys() == {"wte.weight", *(f"h.{n}.{p}" for n in (0, 1) for p in ("weight", "bias")), "decay"}
    model, info = MLXAutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model) is ToyModel and not any(info.values())
    assert all(mx.array_equal(model.state_dict()[name], array) for name, array in state.items())


def test_class_attributes(folder):
    model = MLXAutoModel.from_pretrained(folder, dtype="float16")
    assert model.table.weight.dtype == mx.float16 and model.decay.dtype == mx.float32
    assert "decay" not in dict(model.named_parameters())
    assert model.resize_token_embeddings(40).weight.shape == (40, 8) and model.config.vocab_size == 40
    arrays = load_file(folder / "model.safetensors")
    del arrays["decay"]
    save_file(arrays, folder / "model.safetensors")
    assert MLXAutoModel.from_pretrained(folder).decay.item() == 0.5
    del arrays["h.1.bias"]
    save_file(arrays, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="lacks 1 parameters that ToyModel requires, such as 'blocks.1.bias'"):
        MLXAutoModel.from_pretrained(folder)


def test_embed(folder):
    (result,) = embed(["MKTAYI"], str(folder), layers=[0, -1])
    model = MLXAutoModel.from_pretrained(folder)
    ids = mx.array(EsmTokenizer.from_pretrained(folder)("MKTAYI")["input_ids"])[None]
    states = [model.table(ids)]
    for block in model.blocks:
        states.append(ops.gelu(states[-1] @ block.weight.T + block.bias) + 0.5 * states[-1])
    for layer, expected in ((0, states[0]), (2, states[-1])):
        assert np.allclose(result.arrays[f"mean.{layer}"], np.array(expected[0, 1:-1].mean(axis=0)), atol=1e-6)


def test_task_without_a_class(folder):
    with pytest.raises(
        ValueError, match="MLXAutoModelForMaskedLM has no class for model_type 'toy' .* 'esm', 'esm1', 'esmc'"
    ):
        MLXAutoModelForMaskedLM.from_pretrained(folder)
