"""Damaged parameters in every kind of layer, for every job: an error, or the results of the intact model."""

import itertools
import re
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_esm_hf import EsmcTokenizer, MLXAutoModelForMaskedLM, MLXEsmForProteinFolding, fold, load_protein_model
from mlx_esm_hf.errors import CheckpointError, NonFiniteError
from mlx_esm_hf.ops import kernels
from tests.jobs.models import write_folding_model, write_model
from tests.jobs.test_protein_model import JOBS
from tests.models.esmc.peers import torch_model

NAN_WITH_PAYLOAD = np.uint32(0xFFFFFFFF).view(np.float32)
VALUES = {"nan": np.nan, "nan with a payload": NAN_WITH_PAYLOAD, "inf": np.inf, "-inf": -np.inf, "1e30": 1e30}
SETS = [*(kernels.native.instruction_sets() if kernels.native else []), "off"]
UNNAMED = ("seconds",)  # arrays that differ between runs


def esm2(folder):
    return load_protein_model(MLXAutoModelForMaskedLM, str(write_model(folder)))


def esmc(folder):
    torch_model("lm", hidden_size=64, num_attention_heads=2, intermediate_size=96).save_pretrained(folder)
    EsmcTokenizer().save_pretrained(folder)
    return load_protein_model(MLXAutoModelForMaskedLM, str(folder))


def quantized(activation_dtype, bits):
    def make(folder):
        model = esm2(folder)
        nn.quantize(model.network, 32, bits, class_predicate=lambda _, layer: fits(layer))
        for _, layer in model.network.named_modules():
            if hasattr(layer, "activation_dtype"):
                layer.activation_dtype = activation_dtype
        return model

    return make


def fits(layer):
    return hasattr(layer, "to_quantized") and layer.weight.shape[-1] % 32 == 0


def folding(folder):
    return MLXEsmForProteinFolding.from_pretrained(write_folding_model(folder))


LANGUAGE_MODELS = {
    "ESM-2": esm2,
    "ESMC": esmc,
    "ESM-2, 4 bits": quantized(None, 4),
    "ESM-2, 8 bits, int8": quantized("int8", 8),
}
FOLD = {"fold": lambda model: list(fold([("one", "MKTAYIAK:GSX")], model, num_recycles=1))}


def kinds(network):
    """Return the name of one parameter of each kind: of the last of the layers that are alike."""
    named = {}
    for name, parameter in tree_flatten(network.parameters()):
        if mx.issubdtype(parameter.dtype, mx.floating):
            named[re.sub(r"\.\d+\.", ".N.", name)] = name
    return list(named.values())


def plain(results):
    """Return results as nested lists of arrays that can be compared."""
    if hasattr(results, "rows"):  # of score
        return [np.array([value for value in row.values() if isinstance(value, float)]) for row in results.rows]
    if hasattr(results[0], "arrays"):
        return [x for result in results for name, x in sorted(result.arrays.items()) if name not in UNNAMED]
    return [np.array([design.log_probability]) for design in results] + [design.sequence for design in results]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def outcome(job, model, name, intact):
    """Return what happens: refused, unaffected, or a shortfall."""
    try:
        found = plain(job(model))
    except NonFiniteError as error:
        names_protein = re.search(r"'(one|position 2|wild type|K2A)' is NaN or infinite", str(error))
        return "refused" if names_protein and name in str(error) else f"error without the name: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if same(found, intact):
        return "unaffected"
    return "other results" if all(np.isfinite(x).all() for x in found if isinstance(x, np.ndarray)) else "nan"


def choose(kernel, monkeypatch):
    if kernel == "off":
        monkeypatch.setattr(kernels, "native", None)
    else:
        kernels.native.choose(kernel)


@pytest.mark.long
@pytest.mark.parametrize("kernel", SETS)
@pytest.mark.parametrize("family", [*LANGUAGE_MODELS, "ESMFold"])
def test_damaged_parameters(family, kernel, tmp_path, monkeypatch):
    """NaN always is an error or changes nothing.

    Infinity and 1e30 can saturate a softmax, a gate, a ReLU or a layer norm, in torch as well, and give other numbers.
    Loading refuses such a checkpoint (`test_damaged_checkpoints_of_each_kind`); these are counted.
    """
    model = (LANGUAGE_MODELS | {"ESMFold": folding})[family](tmp_path)
    network, jobs = (model, FOLD) if family == "ESMFold" else (model.network, dict(JOBS))
    if family == "ESMC":  # has no contact head
        del jobs["contacts"]
    before = kernels.native and kernels.native.instruction_set()
    counts, wrong = Counter(), []
    choose(kernel, monkeypatch)
    try:
        intact = {job: plain(run(model)) for job, run in jobs.items()}
        for name in kinds(network):
            healthy = dict(tree_flatten(network.parameters()))[name]
            for (what, value), (job, run) in itertools.product(VALUES.items(), jobs.items()):
                array = np.array(healthy)
                array.flat[array.size // 2] = value
                network.update(tree_unflatten([(name, mx.array(array))]))
                result = outcome(run, model, name, intact[job])
                if result == "other results" and not np.isnan(value):
                    result = "saturated"
                counts[what, result] += 1
                if result not in ("refused", "unaffected", "saturated"):
                    wrong.append((name, what, job, result))
            network.update(tree_unflatten([(name, healthy)]))
    finally:
        if before and kernel != "off":
            kernels.native.choose(before)
    print(f"\n{family}, kernels {kernel}: {sum(counts.values())} tries, shortfalls {len(wrong)}")
    for what in VALUES:
        print(f"  {what}: { ({result: n for (value, result), n in counts.items() if value == what}) }")
    assert not wrong, (len(wrong), wrong[:5])


@pytest.mark.long
@pytest.mark.parametrize("family", [*LANGUAGE_MODELS, "ESMFold"])
def test_damaged_checkpoints_of_each_kind(family, tmp_path):
    """Loading refuses every parameter that is not finite, or whose squares overflow, by its key."""
    model = (LANGUAGE_MODELS | {"ESMFold": folding})[family](tmp_path / "source")
    network = model if family == "ESMFold" else model.network
    network.save_pretrained(tmp_path / "saved")
    path = str(tmp_path / "saved" / "model.safetensors")
    intact, tries = {key: mx.array(x) for key, x in mx.load(path).items()}, 0
    for key, value in itertools.product(kinds_of_keys(intact), VALUES.values()):
        array = np.array(intact[key])
        array.flat[array.size // 2] = value
        mx.save_safetensors(path, intact | {key: mx.array(array)}, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=re.escape(f"{key!r} is damaged")):
            type(network).from_pretrained(tmp_path / "saved")
        tries += 1
    print(f"\n{family}: {tries} damaged checkpoints, all refused")


def kinds_of_keys(arrays):
    """Return a key of each kind, without the frequencies, which follow from the config and are not read."""
    arrays = {key: x for key, x in arrays.items() if not key.endswith("inv_freq")}
    named = {re.sub(r"\.\d+\.", ".N.", k): k for k, x in arrays.items() if mx.issubdtype(x.dtype, mx.floating)}
    return list(named.values())
