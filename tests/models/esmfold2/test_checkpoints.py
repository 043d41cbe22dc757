"""Checkpoints of ESMFold2: names, sizes, Biohub's repositories, quantized language models, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from transformers import EsmFold2Config, EsmFold2Model

import mlx_esm_hf
from mlx_esm_hf import (
    LoraConfig,
    MLXAutoModel,
    MLXEsmcForMaskedLM,
    MLXEsmFold2Config,
    MLXEsmFold2Model,
    add_adapters,
    convert,
)
from mlx_esm_hf.checkpoint.names import canonical_names
from mlx_esm_hf.checkpoint.read import load_file
from mlx_esm_hf.errors import CheckpointError, UserError
from mlx_esm_hf.models.esmfold2.names import BIOHUB, TRANSFORMERS, unpacked
from tests.hub import Hub, serve, use
from tests.jobs.models import write_folding2_model
from tests.models.esmfold2.biohub import as_biohub, config_of_biohub
from tests.tiny import tiny_folding2

# Multiples of 32, so that groups of quantized weights fit, and widths that Biohub's configs can describe.
ESMC = {
    "model_type": "esmc",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "vocab_size": 64,
}


def fields(msa: bool = True) -> dict[str, Any]:
    """Return a config whose feed-forward widths are the multiples that Biohub's configs imply."""
    made = copy.deepcopy(tiny_folding2(msa, esmc_config=ESMC, pair_transition_intermediate_size=96))
    made["atom_encoder"]["intermediate_size"] = 56
    module = made["structure_head"]["diffusion_module"]
    module |= {"intermediate_size": 60, "pair_intermediate_size": 48}
    # Biohub's configs have no rotary pairs for the denoiser: it has the default ones, which need wide heads.
    pairs = {"num_spatial_rope_pairs_per_axis": 2, "num_uid_rope_pairs": 10}
    module["atom_encoder"] |= {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128, **pairs}
    made["msa_encoder"]["intermediate_size"] = 72
    return made


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in transformers' names, with ESMC."""
    return write_folding2_model(tmp_path_factory.mktemp("bundle"), **fields())


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> tuple[Path, Path]:
    """The same checkpoint in Biohub's names, and its ESMC as a checkpoint of its own."""
    folding, esmc = tmp_path_factory.mktemp("biohub"), tmp_path_factory.mktemp("esmc")
    state = load_file(bundle / "model.safetensors")
    arrays = as_biohub(state, mx.concatenate, lambda x: mx.split(x, 2))
    mx.save_safetensors(str(folding / "model.safetensors"), arrays)
    config = config_of_biohub(fields(), "biohub/ESMC")
    (folding / "config.json").write_text(json.dumps(config))
    model = MLXEsmFold2Model.from_pretrained(bundle)
    stem = MLXEsmcForMaskedLM(model.config.esmc_config)
    stem.esmc = model.esmc
    stem.save_pretrained(esmc)
    return folding, esmc


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, parts: tuple[Path, Path]):
    """A local Hub with Biohub's repository and that of ESMC, and an empty cache."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub = Hub()
    with serve(hub) as endpoint:
        use(monkeypatch, endpoint)
        hub.push("biohub/ESMFold2", parts[0])
        hub.push("biohub/ESMC", parts[1])
        yield hub


def parameters(model: Any) -> dict[str, mx.array]:
    found: Any = tree_flatten(model.parameters())
    return dict(found)


def assert_equal(one: Any, two: Any) -> None:
    first, second = parameters(one), parameters(two)
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.dtype == second[name].dtype and mx.array_equal(array, second[name]), name


# Names and sizes

PUBLISHED = {
    "structure_head": {"num_distogram_bins": 64},
    "confidence_head": {"distogram_bins": 39},
    "esmc_config": {
        "model_type": "esmc",
        "hidden_size": 2560,
        "num_attention_heads": 40,
        "num_hidden_layers": 80,
        "intermediate_size": 6912,
        "vocab_size": 64,
    },
}


@pytest.mark.parametrize(
    ("layers", "msa", "count", "keys", "biohub"),
    [(24, False, 188_471_325, 1_054, 1_032), (48, True, 234_622_749, 1_616, None)],
    ids=["Fast", "ESMFold2"],
)
def test_published_sizes(layers: int, msa: bool, count: int, keys: int, biohub: int | None) -> None:
    """Names and shapes are transformers', counted without computing a weight."""
    config = {**PUBLISHED, "folding_trunk_num_hidden_layers": layers, "msa_encoder": {"enabled": msa}}
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model = MLXEsmFold2Model(MLXEsmFold2Config(**copy.deepcopy(config)))
    with torch.device("meta"):
        theirs = EsmFold2Model(EsmFold2Config(**copy.deepcopy(config)))
    ours = {name: array.shape for name, array in parameters(model).items()}
    assert ours == {name: tuple(array.shape) for name, array in theirs.state_dict().items()}
    named = {name: array.size for name, array in model.named_parameters()}
    esmc = [size for name, size in named.items() if name.startswith("esmc.")]
    assert (sum(esmc), len(esmc)) == (6_345_280_000, 1_042)
    assert (sum(named.values()) - sum(esmc), len(ours) - len(esmc)) == (count, keys)
    assert mx.get_peak_memory() - before < 10e6
    # Biohub's names lead to the same names of ours, and none is left over.
    zeros = {name: mx.zeros(shape) for name, shape in ours.items() if not name.startswith("esmc.")}
    arrays = as_biohub(zeros, mx.concatenate, lambda x: mx.split(x, 2))
    assert biohub in (None, len(arrays))
    again = unpacked(arrays, "biohub/ESMFold2")
    names = canonical_names(again, ours, "esmfold2", (TRANSFORMERS, BIOHUB), {})
    assert {name: again[key].shape for key, name in names.items()} == {n: x.shape for n, x in zeros.items()}
    assert mx.get_peak_memory() - before < 10e6


def test_other_names_are_refused(bundle: Path) -> None:
    state = load_file(bundle / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"development version of transformers, such as 'inputs_atom_encoder\."):
        MLXEsmFold2Model.from_pretrained(bundle, key_mapping={r"^input_embedder\.atom_encoder": "inputs_atom_encoder"})
    arrays = as_biohub(state, mx.concatenate, lambda x: mx.split(x, 2))
    missing = "structure_head.diffusion_module.conditioning.z_transitions.0.b_proj.weight"
    del arrays[missing]
    with pytest.raises(CheckpointError, match=f"lacks '{missing}'"):
        unpacked(arrays, "x")


@pytest.mark.parametrize("name", ["structure_head.conditioning.fourier.phases", "confidence_head.boundaries"])
def test_stored_buffers_are_required(bundle: Path, name: str) -> None:
    """They cannot be derived, and random ones would give wrong structures."""
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        MLXEsmFold2Model.from_pretrained(bundle, key_mapping={f"^{name}$": "unknown"})
    model = MLXEsmFold2Model.from_pretrained(bundle)
    assert name in dict(model.named_buffers()) and name not in dict(model.named_parameters())
    trainable: Any = tree_flatten(model.trainable_parameters())
    assert name not in dict(trainable) and name in model.state_dict()


# Configs


def without_dtype(fields: Any) -> Any:
    """Return nested fields without the dtype, which only a saved model has."""
    return {k: without_dtype(v) for k, v in fields.items() if k != "dtype"} if isinstance(fields, dict) else fields


def test_config_of_biohub(bundle: Path) -> None:
    """All fields follow from Biohub's, alone and next to transformers'."""
    theirs = config_of_biohub(fields(), "biohub/ESMC")
    expected = MLXEsmFold2Config.from_dict(json.loads((bundle / "config.json").read_text()))
    for config in (theirs, theirs | {"hidden_size": 32, "single_inputs_size": 87}):
        found = MLXEsmFold2Config.from_dict(config)
        for path in fields():
            if path not in ("esmc_config", "chunk_size"):
                one, two = ({"value": getattr(config, path)} for config in (found, expected))
                for given in (one, two):
                    if hasattr(given["value"], "to_diff_dict"):
                        given["value"] = given["value"].to_diff_dict()
                assert without_dtype(one) == without_dtype(two), path
        assert found.esmc_id == "biohub/ESMC" and found.esmc_config.num_hidden_layers == 2


def test_refused_configs() -> None:
    with pytest.raises(UserError, match="experimental ESMFold2"):
        MLXEsmFold2Config.from_dict({"model_type": "esmfold2", "type": "experimental"})
    with pytest.raises(UserError, match="expected model_type 'esmfold2', got 'esmc'"):
        MLXEsmFold2Config.from_dict({"model_type": "esmc"})
    for path, value, message in (
        ("sliding_window", 1, "sliding_window must be at least 2"),
        ("hidden_size", 0, "hidden_size must be positive"),
    ):
        config = MLXEsmFold2Config(**fields())
        setattr(config, path, value)
        with pytest.raises(UserError, match=message):
            MLXEsmFold2Model(config)


# Biohub's repositories


def test_biohub_repository(hub: Hub, bundle: Path, parts: tuple[Path, Path], tmp_path: Path) -> None:
    """Biohub's repository and that of ESMC are the bundle, bit for bit, and are saved as one."""
    expected = MLXEsmFold2Model.from_pretrained(bundle)
    model = MLXAutoModel.from_pretrained("biohub/ESMFold2")
    assert_equal(model, expected)
    model.save_pretrained(tmp_path / "saved")
    assert_equal(MLXEsmFold2Model.from_pretrained(tmp_path / "saved"), expected)
    theirs = EsmFold2Model.from_pretrained(tmp_path / "saved")
    for name, array in theirs.state_dict().items():
        np.testing.assert_array_equal(array.numpy(), parameters(expected)[name], err_msg=name)
    assert_equal(MLXEsmFold2Model.from_pretrained(parts[0], esmc_id=str(parts[1])), expected)
    assert_equal(MLXEsmFold2Model.from_pretrained("biohub/ESMFold2", local_files_only=True), expected)


def test_missing_language_model(hub: Hub, parts: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"needs the language model biohub/other \(esmc_id in its config\).*not found"):
        MLXEsmFold2Model.from_pretrained(parts[0], esmc_id="biohub/other")
    with pytest.raises(OSError, match="needs the language model biohub/ESMC"):
        MLXEsmFold2Model.from_pretrained(parts[0], local_files_only=True)
    other = MLXEsmFold2Config(**fields()).esmc_config
    other.num_hidden_layers = 3
    MLXEsmcForMaskedLM(other).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="needs an ESMC with 2 layers of width 64, but .* has 3 of width 64"):
        MLXEsmFold2Model.from_pretrained(parts[0], esmc_id=str(tmp_path))


# Quantization

OPTIONS = {"num_diffusion_samples": 1, "num_sampling_steps": 4, "num_loops": 1}


def test_quantized_language_model(hub: Hub, bundle: Path, parts: tuple[Path, Path], tmp_path: Path) -> None:
    """`convert` quantizes the language model alone, in a bundle and in a repository of its own."""
    whole = MLXEsmFold2Model.from_pretrained(bundle)
    for name, source in (("bundle", bundle), ("biohub", "biohub/ESMFold2")):
        convert(source, tmp_path / name, quantize=True, bits=8, group_size=32)
    convert(parts[1], tmp_path / "esmc", quantize=True, bits=8, group_size=32)
    one, two, three = (
        MLXEsmFold2Model.from_pretrained(tmp_path / "bundle"),
        MLXEsmFold2Model.from_pretrained(tmp_path / "biohub"),
        MLXEsmFold2Model.from_pretrained(parts[0], esmc_id=str(tmp_path / "esmc")),
    )
    assert_equal(one, two)
    assert_equal(one, three)
    names = {name.rpartition(".")[0] for name in parameters(one) if name.endswith(".scales")}
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    kinds += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert names == {f"esmc.layers.{layer}.{kind}" for layer in (0, 1) for kind in kinds}
    for name, array in parameters(whole).items():
        if not name.startswith("esmc."):
            assert mx.array_equal(array, parameters(one)[name])
    quantized, exact = (model.infer_protein("MKTAYIAKQR", **OPTIONS) for model in (one, whole))
    difference = np.abs(np.array(quantized.distogram_logits) - np.array(exact.distogram_logits)).max()
    assert 0 < difference < 0.1 * np.abs(np.array(exact.distogram_logits)).max()
    convert(tmp_path / "bundle", tmp_path / "plain", dequantize=True)
    plain = MLXEsmFold2Model.from_pretrained(tmp_path / "plain")
    assert not any(name.endswith(".scales") for name in parameters(plain))
    one.save_pretrained(tmp_path / "again")
    assert_equal(MLXEsmFold2Model.from_pretrained(tmp_path / "again"), one)


def test_the_folding_part_is_not_quantized(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be quantized: .*mlx.nn.quantize\(model.esmc\)"):
        import mlx.nn as nn

        nn.quantize(MLXEsmFold2Model.from_pretrained(bundle), 32, 8)
    with pytest.raises(UserError, match="--report compares language models, but .* predicts structures"):
        convert(bundle, tmp_path / "out", quantize=True, group_size=32, report=["MKTAYIAKQR"])


def test_adapters(bundle: Path) -> None:
    """Layers of the language model can have adapters; those of the folding part, whose weights operations read, not."""
    model = MLXEsmFold2Model.from_pretrained(bundle)
    with pytest.raises(UserError, match="cannot have an adapter: the operations of folding read plain weights"):
        add_adapters(model, LoraConfig(target_modules=["proj_emit"], r=2))
    before = np.array(model.infer_protein("MKTAY", **OPTIONS).distogram_logits)
    add_adapters(model, LoraConfig(target_modules=["q_proj"], r=2, exclude_modules=r"(?!esmc).*"))
    np.testing.assert_allclose(np.array(model.infer_protein("MKTAY", **OPTIONS).distogram_logits), before, atol=1e-4)


# What is for language models


@pytest.mark.parametrize("job", ["embed", "score", "fill_mask", "contacts", "perplexity", "generate"])
def test_other_jobs_name_what_to_do(bundle: Path, job: str) -> None:
    run, inputs = getattr(mlx_esm_hf, job), ["MKT<mask>YIAK"]
    with pytest.raises(ValueError, match=r"is an ESMFold2.*mlx-esm fold") as error:
        list(run(["M1A"], "MKTYIAK", str(bundle)) if job == "score" else run(inputs, str(bundle)))
    assert "\n" not in str(error.value)
