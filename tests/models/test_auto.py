"""Auto classes choose a class by model_type."""

import mlx.core as mx
import pytest
from transformers import BertConfig

import mlx_esm_hf
from mlx_esm_hf import MLXEsm1Config, MLXEsmcConfig, MLXEsmConfig
from tests.tiny import SIZE, as_loaded, tiny

CONFIGS = {
    "esm": lambda: MLXEsmConfig(**tiny()),
    "esm1": lambda: MLXEsm1Config(**SIZE),
    "esmc": lambda: MLXEsmcConfig(**SIZE),
}
FAMILIES = {"esm": "MLXEsm", "esm1": "MLXEsm", "esmc": "MLXEsmc"}
TASKS = ("Model", "ModelForMaskedLM", "ModelForSequenceClassification", "ModelForTokenClassification")


def classes(task, model_type="esm"):
    name = f"{FAMILIES[model_type]}{task.removeprefix('Model') or 'Model'}"
    return getattr(mlx_esm_hf, f"MLXAuto{task}"), getattr(mlx_esm_hf, name)


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("task", TASKS)
def test_class_and_arguments(tmp_path, task, model_type):
    auto, expected = classes(task, model_type)
    saved = as_loaded(auto.from_config(CONFIGS[model_type]()))
    assert type(saved) is expected
    saved.save_pretrained(tmp_path)
    model, info = auto.from_pretrained(tmp_path, dtype="float16", output_loading_info=True)
    assert type(model) is expected and model.dtype == mx.float16 and not any(info.values())
    assert model.config.model_type == model_type
    by_config = auto.from_pretrained(tmp_path, config=CONFIGS[model_type](), initializer_range=0.25)
    assert by_config.config.initializer_range == 0.25


def test_arguments_of_the_class(tmp_path):
    mlx_esm_hf.MLXAutoModel.from_config(CONFIGS["esm"]()).save_pretrained(tmp_path)
    assert mlx_esm_hf.MLXAutoModel.from_pretrained(tmp_path).pooler is not None
    assert mlx_esm_hf.MLXAutoModel.from_pretrained(tmp_path, add_pooling_layer=False).pooler is None


@pytest.mark.parametrize("task", TASKS)
def test_unknown_family(tmp_path, task):
    BertConfig().save_pretrained(tmp_path)
    auto, _ = classes(task)
    for load, source in ((auto.from_pretrained, tmp_path), (auto.from_config, BertConfig())):
        with pytest.raises(
            ValueError, match=f"MLXAuto{task} has no class for model_type 'bert' .* 'esm', 'esm1', 'esmc'"
        ):
            load(source)
