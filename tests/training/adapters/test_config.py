"""`LoraConfig` and `adapter_config.json`, with PEFT's as the reference."""

import dataclasses
import logging

import peft
import pytest

from mlx_esm_hf.training.adapters import LoraConfig, load_adapter
from mlx_esm_hf.training.adapters.config import IGNORED_FIELDS, OtherFields
from tests.training.adapters.helpers import assert_refused, our_base, set_in_config

REFUSED = sorted(field.name for field in dataclasses.fields(OtherFields))


def test_every_field_of_peft_is_known():
    """Each is supported, refused or ignored. A new version of PEFT may add fields."""
    ours, theirs = ({f.name for f in dataclasses.fields(config)} for config in (LoraConfig, peft.LoraConfig))
    assert ours | IGNORED_FIELDS == theirs and not ours & IGNORED_FIELDS
    defaults = peft.LoraConfig()
    assert all(getattr(defaults, f.name) == f.default for f in dataclasses.fields(OtherFields))


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_change_results_are_refused(saved, name):
    set_in_config(saved, **{name: [1]})
    assert_refused(saved, rf"adapter_config.json: {name}=\[1\] is not supported and changes what the adapter computes")
    with pytest.raises(ValueError, match=rf"{name}=\[1\] is not supported"):
        LoraConfig(**{name: [1]})


def test_peft_objects():
    """A configuration of PEFT has the same meaning as ours; fields that PEFT stores as sets keep their names."""
    settings = {"r": 3, "lora_alpha": 5, "modules_to_save": ["classifier"], "use_rslora": True, "bias": "lora_only"}
    settings |= {"layers_to_transform": [0], "layers_pattern": "layer", "rank_pattern": {"query": 2}}
    theirs = peft.LoraConfig(target_modules=["query", "key"], task_type="SEQ_CLS", inference_mode=True, **settings)
    ours = LoraConfig.from_peft(theirs)
    assert ours == LoraConfig(target_modules=["key", "query"], task_type="SEQ_CLS", **settings)
    with pytest.raises(ValueError, match="use_qalora=True is not supported"):
        LoraConfig.from_peft(peft.LoraConfig(use_qalora=True))
    with pytest.raises(ValueError, match="init_lora_weights must be True, False or 'gaussian', got 'pissa'"):
        LoraConfig.from_peft(peft.LoraConfig(init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="peft_type must be 'LORA', got 'IA3'"):
        LoraConfig.from_peft(peft.IA3Config())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialized by 'pissa_niter_4', which changes the base model"),
        ({"bias": "some"}, "bias must be one of none, all, lora_only, got 'some'"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform must be layer numbers"),
        ({"layers_to_transform": 1, "target_modules": ".*query"}, "layers_to_transform needs a list of target_modules"),
        ({"layers_pattern": "layer"}, "layers_pattern needs layers_to_transform"),
        ({"layers_to_transform": [7]}, r"no such linear layer that is not excluded found"),
        ({"r": 0}, "r must be an integer from 1 to 65535, got 0"),
        ({"r": 10**12}, "r must be an integer from 1 to 65535, got 1000000000000"),
        ({"r": "8"}, "r must be an integer from 1 to 65535, got '8'"),
        ({"rank_pattern": {"query": True}}, "r must be an integer from 1 to 65535, got True"),
        ({"rank_pattern": [3]}, r"rank_pattern must be a dictionary, got \[3\]"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number, got nan"),
        ({"lora_dropout": 1}, r"lora_dropout must be in \[0, 1\), got 1"),
        ({"target_modules": [3]}, r"target_modules must be a list of module names, got \[3\]"),
        ({"target_modules": "(query"}, r"'\(query' is not a regular expression"),
        ({"modules_to_save": "classifier"}, "modules_to_save must be a list of module names, got 'classifier'"),
        (
            {"target_modules": ["q_proj"]},
            r"no such linear layer found in MLXEsmForMaskedLM. It has.*layer.N.attention.self.key",
        ),
        ({"target_modules": ["word_embeddings"]}, "word_embeddings must be a linear layer, got Embedding"),
        (
            {"modules_to_save": ["score"]},
            r"modules_to_save=\['score'\]: no such module found. The model has esm, lm_head",
        ),
        ({"target_modules": ["query"]}, r"contains 'esm.*value.lora_A.weight', which is neither"),
        ({"use_dora": True}, r"missing 6 of the adapter's arrays, such as 'esm.*query.lora_magnitude_vector'"),
        ({"r": 5}, r"query.lora_A.weight' .* shape \(5, 32\), got mlx.core.float32 of shape \(4, 32\)"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_configs_that_are_refused(saved, settings, message):
    set_in_config(saved, **settings)
    assert_refused(saved, message)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000])
def test_damaged_config(saved, text):
    (saved / "adapter_config.json").write_text(text)
    assert_refused(saved, "is not JSON|must contain a JSON object")


def test_unknown_fields_are_ignored_with_a_warning(saved, caplog):
    set_in_config(saved, my_note="hemolysis", peft_version="9.9")
    with caplog.at_level(logging.WARNING):
        load_adapter(our_base(saved.parent / "base", "lm"), saved)
    assert [r.getMessage() for r in caplog.records] == [
        f"{saved / 'adapter_config.json'}: unknown fields are ignored: my_note."
    ]
