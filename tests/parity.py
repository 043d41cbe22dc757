"""Shared code of the parity tests: the same small random model in MLX and torch, a float64 reference, and the bar.

Outputs at real tokens must be within the error bar of `tests/bar.py`. All comparisons are recorded, and `report`
returns the table that is printed at the end of the test session.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import esm as fair_esm
import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers

import mlx_esm_hf
from mlx_esm_hf.models.esm.names import FAIR_ESM_1
from tests.bar import FLOORS, MEASURES, RATIO, Errors, hold_to_bar
from tests.tiny import FAMILIES, ODD_SIZES, tiny

transformers.utils.logging.disable_progress_bar()

CLS, PAD, EOS, MASK = 0, 1, 2, 32  # of ESM-1b, ESM-1v and ESM-2
RESIDUES = range(4, 24)

HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "model": ("Model", {}),
    "lm": ("ForMaskedLM", {}),
    "token": ("ForTokenClassification", {"num_labels": 3}),
    "single_label": ("ForSequenceClassification", {"num_labels": 5, "problem_type": "single_label_classification"}),
    "multi_label": ("ForSequenceClassification", {"num_labels": 4, "problem_type": "multi_label_classification"}),
    "regression": ("ForSequenceClassification", {"num_labels": 1, "problem_type": "regression"}),
    "regressions": ("ForSequenceClassification", {"num_labels": 3, "problem_type": "regression"}),
}


def config(family: str, head: str = "lm", **overrides: Any) -> transformers.EsmConfig:
    size = ODD_SIZES[(list(FAMILIES).index(family) + list(HEADS).index(head)) % len(ODD_SIZES)]
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.EsmConfig(**tiny(family, **{**off, **size, **HEADS[head][1], **overrides}))


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Set weights with which every part of the network, including biases and layer norms, affects the output."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=random)
        if parameter.ndim == 1:
            noise = 0.2 * noise + ("norm" in name.lower() and name.endswith("weight"))
        else:
            noise *= 0.1 + 0.2 * torch.rand((), generator=random)
        parameter.data = noise


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: the models are so small that threads only wait, up to ten times as long under load."""
    threads: list[tuple[Any, Any]] = [(torch.get_num_threads, torch.set_num_threads)]
    spec = importlib.util.find_spec("scipy_openblas32")
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in Path(folder, "lib").glob("libscipy_openblas*.so"):
            library = ctypes.CDLL(str(path))
            threads.append((library.scipy_openblas_get_num_threads, library.scipy_openblas_set_num_threads))
    before = [(put, get()) for get, put in threads]
    for put, _ in before:
        put(1)
    yield
    for put, number in before:
        put(number)


# The same model three times


class Peers(NamedTuple):
    mlx: Any
    torch: Any
    float64: Any


def peers(folder: Path, family: str, head: str, **overrides: Any) -> Peers:
    """Return a model that transformers saved, the same model loaded in MLX, and its float64 copy."""
    suffix = HEADS[head][0]
    model = getattr(transformers, f"Esm{suffix}")(config(family, head, **overrides)).eval()
    model.set_attn_implementation("eager")
    randomize(model, seed=len(family) + len(head))
    model.save_pretrained(folder)
    mlx = getattr(mlx_esm_hf, f"MLXEsm{suffix}").from_pretrained(folder)
    return Peers(mlx, model, copy.deepcopy(model).double())


def from_fair_esm(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the gradients of fair-esm's ESM-1 to the names of our masked language model."""
    names = {key: FAIR_ESM_1.ours(key) or key for key in state}
    return {name if name.startswith("lm_head.") else f"esm.{name}": state[key] for key, name in names.items()}


def fair_esm_peers(family: str, token_dropout: bool = True, final_bias: bool = True, positions: int = 330) -> Peers:
    """Return a model of fair-esm, the same model in MLX, and its float64 copy."""
    D, layers, heads = 48, 3, 4
    size = {"hidden_size": D, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * D}
    settings = {**size, "token_dropout": token_dropout}
    args = argparse.Namespace(
        layers=layers, embed_dim=D, ffn_embed_dim=4 * D, attention_heads=heads, token_dropout=token_dropout
    )
    if family == "ESM-1":
        args.arch, args.final_bias = "protein_bert_base", final_bias
        model = fair_esm.ProteinBertModel(args, fair_esm.Alphabet.from_architecture("ESM-1"))
        mlx_config: Any = mlx_esm_hf.MLXEsm1Config(**settings, lm_head_bias=final_bias)
    elif family == "ESM-2":
        model = fair_esm.ESM2(layers, D, heads, "ESM-1b", token_dropout)
        mlx_config = config(family, **settings)
    else:
        args.arch, args.max_positions = "roberta_large", positions
        args.emb_layer_norm_before = FAMILIES[family]["emb_layer_norm_before"]
        model = fair_esm.ProteinBertModel(args, fair_esm.Alphabet.from_architecture("ESM-1b"))
        mlx_config = config(family, **settings, max_position_embeddings=positions + PAD + 1)
    mlx_config.layer_norm_eps = model.layers[0].final_layer_norm.eps
    randomize(model.eval(), seed=len(family))
    mlx = mlx_esm_hf.MLXEsmForMaskedLM(mlx_config)
    mlx.load_state_dict(model.state_dict())
    return Peers(mlx.eval(), model, copy.deepcopy(model).double())


def in_precision(model: Peers, precision: str) -> Peers:
    """Copy peers in "float16" or "bfloat16".

    The float64 reference gets the rounded weights, so that only the computation is compared. `inv_freq` stays float32
    in torch, as in MLX.
    """
    mlx, theirs = copy.deepcopy(model.mlx).to(precision), copy.deepcopy(model.torch).to(getattr(torch, precision))
    for name, buffer in model.torch.named_buffers():
        if name.endswith("inv_freq"):
            theirs.get_buffer(name).data = buffer.clone()
    return Peers(mlx, theirs, copy.deepcopy(theirs).double())


@contextlib.contextmanager
def true_float64() -> Iterator[None]:
    """Use float64 where a float64 model would cast to float32.

    transformers casts the rotation, its angles and the ratio of masked tokens; fair-esm casts softmax, the sinusoidal
    table and that ratio.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


# Inputs


def pad(rows: list[Any], side: str = "right", value: int = PAD, extra: int = 0) -> np.ndarray:
    length = max(map(len, rows)) + extra
    gaps = [[value] * (length - len(row)) for row in rows]
    padded = [[*gap, *row] if side == "left" else [*row, *gap] for gap, row in zip(gaps, rows, strict=True)]
    return np.array(padded)


def with_mask(rows: list[Any], side: str = "right", extra: int = 0) -> dict[str, np.ndarray]:
    real = [np.ones(len(row), dtype=int) for row in rows]
    return {"input_ids": pad(rows, side, extra=extra), "attention_mask": pad(real, side, 0, extra=extra)}


LENGTHS = (21, 15, 8, 12, 2, 19, 11, 17)


def batch(
    padding: str = "right",
    masks: bool = True,
    seed: int = 0,
    head: str = "model",
    lengths: tuple[int, ...] = LENGTHS,
) -> dict[str, np.ndarray]:
    """Return token ids, an attention mask unless `padding` is "none", and the labels of the head."""
    random = np.random.default_rng(seed)
    if padding == "none":
        lengths = (max(lengths),) * len(lengths)
    sequences = [np.array([CLS, *random.choice(RESIDUES, n), EOS]) for n in lengths]
    rows = [row.copy() for row in sequences]
    if masks:
        for row in rows:
            row[random.choice(np.arange(1, len(row) - 1), max(1, len(row) // 6), replace=False)] = MASK
    inputs = with_mask(rows, padding)
    if padding == "none":
        del inputs["attention_mask"]

    suffix, settings = HEADS[head]
    B = len(rows)
    if head == "lm":
        labels = [np.where(random.random(len(row)) < 0.5, row, -100) for row in sequences]
        inputs["labels"] = pad(labels, padding, -100)
    elif head == "token":
        labels = [np.array([-100, *random.integers(0, settings["num_labels"], n), -100]) for n in lengths]
        inputs["labels"] = pad(labels, padding, -100)
    elif head == "single_label":
        inputs["labels"] = random.integers(0, settings["num_labels"], B)
        inputs["labels"][1] = -100
    elif head == "multi_label":
        inputs["labels"] = random.integers(0, 2, (B, settings["num_labels"])).astype(np.float32)
    elif head == "regression":
        inputs["labels"] = random.normal(size=B).astype(np.float32)
    elif head == "regressions":
        inputs["labels"] = random.normal(size=(B, settings["num_labels"])).astype(np.float32)
    return inputs


# Outputs


def for_torch(inputs: Mapping[str, Any], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    dtype = next(model.parameters()).dtype
    tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}


def as_numpy(x: Any) -> np.ndarray:
    """Convert an array of MLX or torch to NumPy; bfloat16, which NumPy lacks, becomes float32."""
    if isinstance(x, torch.Tensor):
        return (x.to(torch.float32) if x.dtype == torch.bfloat16 else x).numpy()
    return np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)


def mask_of(inputs: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(inputs.get("attention_mask", np.ones(inputs["input_ids"].shape, dtype=int)))


Answers = dict[str, list[np.ndarray]]


def answers(model: Any, inputs: Mapping[str, Any], attentions: bool = True) -> Answers:
    """Return the outputs of a model, transformers' or ours: {output: [array] or the arrays of all layers}.

    Without attentions (and contacts, which need them), our models use fused attention.
    """
    mask = {"attention_mask": mask_of(inputs)} if attentions and "input_ids" in inputs else {}
    if isinstance(model, torch.nn.Module):
        inputs, mask = for_torch(inputs, model), for_torch(mask, model)
    with torch.no_grad():
        output = dict(model(**inputs, output_hidden_states=True, output_attentions=attentions))
        if mask:
            owner = model if hasattr(model, "predict_contacts") else model.base_model
            output["contacts"] = owner.predict_contacts(inputs["input_ids"], **mask)
    layers = {name: value if isinstance(value, tuple) else (value,) for name, value in output.items()}
    # transformers returns an empty tuple of cross_attentions
    return {name: [as_numpy(x) for x in values] for name, values in layers.items() if values}


def fair_esm_answers(model: torch.nn.Module, tokens: np.ndarray) -> Answers:
    """Return the same outputs of a model of fair-esm."""
    with torch.no_grad():
        output = model(torch.from_numpy(tokens), repr_layers=range(model.num_layers + 1), return_contacts=True)
    return {
        "logits": [as_numpy(output["logits"])],
        "hidden_states": [as_numpy(output["representations"][layer]) for layer in range(model.num_layers + 1)],
        "attentions": [as_numpy(a) for a in output["attentions"].unbind(1)],
        "contacts": [as_numpy(output["contacts"])],
    }


def at_real_tokens(name: str, value: np.ndarray, real: np.ndarray) -> np.ndarray:
    if name == "attentions":  # from real queries to all keys
        return value.swapaxes(1, 2)[real]
    if name in ("hidden_states", "last_hidden_state") or (name == "logits" and value.ndim == 3):
        return value[real]
    return value


# The bar


class Comparison(NamedTuple):
    precision: str
    model: str
    output: str
    family: str
    errors: Errors

    @property
    def ratio(self) -> float:
        """Our error over torch's; 0 if ours is below the floor."""
        e = self.errors
        return e.ours / max(e.torch, 1e-30) if e.ours > FLOORS[self.precision] * e.scale else 0.0


COMPARISONS: list[Comparison] = []


def hold(
    model: str,
    output: str,
    family: str,
    ours: Any,
    theirs: Any,
    float64: Any,
    scale: float = 0.0,
    precision: str = "float32",
) -> None:
    """Hold one output to the bar; `scale` is a lower bound for its scale."""
    label = f"{precision} {family} {model} {output}"
    for found in hold_to_bar(ours, theirs, float64, label, scale, floor=FLOORS[precision]):
        COMPARISONS.append(Comparison(precision, model, output, family, found))


def hold_all(
    model: Peers,
    family: str,
    inputs: Mapping[str, Any],
    theirs: Answers,
    *float64: tuple[str, Answers],
    precision: str = "float32",
) -> None:
    """Hold all outputs of a model to the bar, against each (name, float64 outputs)."""
    real = np.array(inputs["attention_mask"] if "inputs_embeds" in inputs else mask_of(inputs), dtype=bool)
    complete, brief = answers(model.mlx, inputs), answers(model.mlx, inputs, attentions=False)
    assert complete.keys() == theirs.keys() == brief.keys() | ({"attentions", "contacts"} & theirs.keys())
    for ours in complete, brief:
        for oracle, wanted in float64:
            for name, layers in ours.items():
                for layer in zip(layers, theirs[name], wanted[name], strict=True):
                    compared = (at_real_tokens(name, value, real) for value in layer)
                    hold(type(model.mlx).__name__ + oracle, name, family, *compared, precision=precision)


def report() -> list[str]:
    """Return a table of the largest errors per precision, model and output, over all families and inputs."""
    columns = f"{'compared':>8} {'max ratio':>9} {'rms ratio':>9} {'ours':>8} {'torch':>8} {'of bar':>7}"
    lines = [f"{'':8} {'model':44} {'output':18} {columns}  worst family"]
    for precision, model, output in sorted({c[:3] for c in COMPARISONS}):
        rows = [c for c in COMPARISONS if c[:3] == (precision, model, output)]
        ratios = {measure: max(c.ratio for c in rows if c.errors.measure == measure) for measure in MEASURES}
        worst = max(rows, key=lambda c: c.errors.ours / max(c.errors.allowed, 1e-30))
        largest = max(rows, key=lambda c: c.errors.ours / max(c.errors.scale, 1e-30)).errors
        shown = [f"{ratio:9.2f}" if ratio else f"{'-':>9}" for ratio in ratios.values()]
        errors = [error / max(largest.scale, 1e-30) for error in (largest.ours, largest.torch)]
        lines.append(
            f"{precision:8} {model:44} {output:18} {len(rows) // 2:8} {' '.join(shown)} {errors[0]:8.1e} "
            f"{errors[1]:8.1e} {worst.errors.ours / max(worst.errors.allowed, 1e-30):7.0%}  {worst.family}"
        )
    floors = ", ".join(f"{floor:.1e} in {precision}" for precision, floor in FLOORS.items())
    return [
        *lines,
        "ratio: error of MLX / error of torch, both against float64; - if the error of MLX is below the floor.",
        "ours, torch: the largest error of MLX over the scale of the output, and torch's error there.",
        f"of bar: error of MLX / ({RATIO} x error of torch + floor). Floors, over the scale: {floors}.",
    ]
