"""Convert a checkpoint to another precision: cast, quantize or dequantize it, and compare it with the original."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_esm_hf.checkpoint.read import load_file
from mlx_esm_hf.checkpoint.resolve import checkpoint_files, find_file
from mlx_esm_hf.checkpoint.write import check_shard_size, save_safetensors
from mlx_esm_hf.checks import check_choice
from mlx_esm_hf.data.proteins import Protein, Report
from mlx_esm_hf.data.source import Proteins, check_fasta, is_stream, read_proteins
from mlx_esm_hf.data.tokenizer import load_tokenizer
from mlx_esm_hf.data.vocabulary import Vocabulary, refuse_other_sequences
from mlx_esm_hf.dtypes import STORED_DTYPES
from mlx_esm_hf.errors import CheckpointError, UserError
from mlx_esm_hf.hub.card import task_head
from mlx_esm_hf.hub.files import CARD, CONFIG, FIGURES, OTHERS, REPORT
from mlx_esm_hf.hub.publish import Publication, hub_id, publish
from mlx_esm_hf.jobs.protein_model import load_network
from mlx_esm_hf.loading import commit_of, read_config, squares_overflow, unusable
from mlx_esm_hf.modeling_utils import MLXPreTrainedModel
from mlx_esm_hf.models.auto import (
    MLXAutoModel,
    MLXAutoModelForMaskedLM,
    MLXAutoModelForSequenceClassification,
    MLXAutoModelForTokenClassification,
    open_checkpoint,
)
from mlx_esm_hf.models.esmfold2.modeling_esmfold2 import MLXEsmFold2Model
from mlx_esm_hf.quantization.layers import (
    INTEGER_BITS,
    QuantSpec,
    block_of,
    choose_specs,
    dequantize_layers,
    make_spec,
    replace_layers,
)
from mlx_esm_hf.quantization.report import Row, compare, table
from mlx_esm_hf.runtime.files import check_new_folder, new_folder
from mlx_esm_hf.version import __version__

CLASSES: dict[str, Any] = {
    "": MLXAutoModel,
    "ForMaskedLM": MLXAutoModelForMaskedLM,
    "ForSequenceClassification": MLXAutoModelForSequenceClassification,
    "ForTokenClassification": MLXAutoModelForTokenClassification,
}
COPIED = [name for name in OTHERS if name not in (CONFIG, CARD, REPORT, FIGURES)]

How = int | str | None  # bits, a mode, or None for full precision


@dataclass
class Conversion:
    """The result of `convert`.

    Attributes:
        notes: what was done, in sentences.
        rows: table of (quantity, before, after).
        publication: what was published, if anything.
    """

    notes: list[str]
    rows: list[Row] = field(default_factory=list)
    publication: Publication | None = None

    def markdown(self) -> str:
        """Return notes and table for the model card."""
        table = ["| | before | after |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in self.rows)]
        return "\n".join([" ".join(self.notes), "", *table]) + "\n"


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    quantize: bool = False,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str | None = None,
    activation_dtype: str | None = None,
    rules: Mapping[str, How] | None = None,
    dequantize: bool = False,
    max_shard_size: int | str = "5GB",
    revision: str | None = None,
    report: Proteins | None = None,
    upload_repo: str | None = None,
) -> Conversion:
    """Convert a checkpoint to another precision, and copy its tokenizer.

    Arrays are read, converted and written one by one, so that memory holds little more than the largest (for `.bin`
    files, only if the CPU kernels are available). Without `quantize` or `dequantize` the checkpoint is rewritten as
    safetensors under the published keys.

    Args:
        source: Hub id or folder.
        output: folder that is empty or does not exist.
        dtype: "float32", "float16" or "bfloat16", for weights that are not quantized; by default the source's.
        quantize: quantize the encoder's layers. Embeddings and heads stay in full precision.
        bits: bits per weight, 4 by default; see `mlx.core.quantize`.
        group_size: weights that share a scale, 64 by default. A layer whose width the group size does not divide gets
            smaller groups, or stays in full precision if no group size divides it.
        mode: "affine" (default), "mxfp4", "mxfp8" or "nvfp4".
        activation_dtype: "int8" rounds the inputs of quantized layers to 8 bits, with a scale for each token and group,
            whenever the model runs. It needs 4 or 8 bits and is faster on a CPU.
        rules: {shell pattern of a layer's path: bits (affine), a mode, or None for full precision}, such as
            {"lm_head.*": 8, "*.layer.0.*": None}. The last match counts.
        dequantize: turn a quantized checkpoint into a plain one, which transformers loads.
        max_shard_size: in bytes, or a string such as "5GB".
        revision: branch, tag or commit of the source.
        report: proteins, as for `read_proteins`, on which the result is compared with the source
            (`mlx_esm_hf.quantization.report.compare`). CONVERSION.json has the numbers.
        upload_repo: Hub repository to publish the result in, see `mlx_esm_hf.hub.publish`.

    Raises:
        ValueError: options that contradict each other, an unsupported quantization, or a rule that matches no layer.
        OSError: the source was not found, `output` is not empty, or the Hub refused.
        CheckpointError: the source is damaged.

    Example:
        >>> convert("facebook/esm2_t33_650M_UR50D", "esm2-650M-4bit", quantize=True, dtype="float16")
    """
    source = os.fspath(source)
    check_options(
        dtype,
        quantize,
        dequantize,
        bits=bits,
        group_size=group_size,
        mode=mode,
        activation_dtype=activation_dtype,
        rules=rules,
    )
    usual = make_spec(bits, group_size, mode or "affine", activation_dtype)
    exceptions = {pattern: spec_of_rule(how, usual) for pattern, how in (rules or {}).items()}
    check_shard_size(max_shard_size)
    check_new_folder(Path(output).resolve())
    if isinstance(report, (str, os.PathLike)) and not is_stream(os.fspath(report)):
        check_fasta(os.fspath(report))
    commit = commit_of(source, revision or "main") or "main"
    config = read_config(source, revision=commit)
    if (quantize or dequantize) and bool(config.get("quantization")) == quantize:
        raise UserError(f"{source} is {'already quantized' if quantize else 'not quantized'}.")
    cls = class_of(config, source)
    checkpoint = open_checkpoint(cls, source, commit)
    if report is not None and checkpoint.model_class is MLXEsmFold2Model:
        raise UserError(f"--report compares language models, but {source} predicts structures. Leave it out.")
    if quantize:
        choose_specs(checkpoint.skeleton(), usual, exceptions)  # refuses rules that match no layer
    proteins = None if report is None else read_for_report(report, source, commit)
    precision: Any = dtype or config.get("dtype") or config.get("torch_dtype") or stored_dtype(source, commit)

    with new_folder(Path(output).resolve()) as folder:
        model, info = load_network(cls, source, revision=commit, dtype=precision, lazy=True, output_loading_info=True)
        conversion = Conversion([f"Made from {origin(source, commit)} by mlx-esm-hf {__version__}."])
        if info["unexpected_keys"]:
            conversion.notes.append(f"Left out: {', '.join(sorted(info['unexpected_keys']))}.")
        if quantize:
            conversion.notes += quantize_layers(model, usual, exceptions)
        if dequantize:
            dequantize_layers(model, model.dtype)
            conversion.notes.append("The weights were dequantized and keep their quantized values.")
        whole = "Other weights" if block_of(model) else "The weights"
        conversion.notes.append(f"{whole} are {model.config.dtype}.")
        parameters = model.num_parameters()
        written, state = model.to_save(given_parameters(model))
        del model
        gc.collect()  # a model is in reference cycles, and keeps every computed array alive
        save_safetensors(state, folder, max_shard_size)
        refuse_unusable(cls, source, commit, folder)
        written.save_pretrained(folder)
        copy_others(source, commit, folder)

        sizes = [weights_size(place, commit) for place in (source, str(folder))]
        conversion.rows.append(("size on disk", *(f"{size / 1e6:,.1f} MB" for size in sizes)))
        conversion.rows.append(("bits a parameter", *(f"{8 * size / parameters:.2f}" for size in sizes)))
        if proteins is not None:
            figures = compare(cls, source, str(folder), commit, [protein.sequence for protein in proteins])
            conversion.rows += table(figures)
            figures["bytes_on_disk"] = dict(zip(("before", "after"), sizes, strict=True))
            (folder / FIGURES).write_text(json.dumps(figures, indent=1) + "\n")
        (folder / REPORT).write_text(conversion.markdown(), encoding="utf-8")
    if upload_repo is not None:
        conversion.publication = publish(output, upload_repo, base_model=hub_id(source))
    return conversion


def refuse_unusable(cls: Any, source: str, revision: str, folder: Path) -> None:
    """Check the written weights for values that are NaN or infinite, such as those that overflow in a smaller dtype.

    Reading the files again needs no more memory than the largest array.

    Raises:
        CheckpointError: such values. The message names the parameter, and its largest value in the source.
    """
    for path in checkpoint_files(str(folder)):
        for key, array in load_file(path).items():
            if mx.issubdtype(array.dtype, mx.floating) and squares_overflow(array):
                model = load_network(cls, source, revision=revision, dtype="float32", lazy=True)
                dequantize_layers(model, mx.float32)
                _, stored = model.to_save(given_parameters(model))
                weight = re.sub(r"\.(scales|biases)$", ".weight", key)
                raise CheckpointError(f"{source}: {unusable(key, array, stored.get(weight, array))}")


def read_for_report(proteins: Proteins, source: str, revision: str) -> list[Protein]:
    """Read the proteins of the report before converting, so that errors come early.

    Raises:
        ValueError: there are no proteins, some cannot be read, or the model is for other sequences.
        OSError: the file was not found, or the source has no tokenizer.
    """
    refuse_other_sequences(Vocabulary(load_tokenizer(source, revision=revision), source), "convert --report")
    found = list(read_proteins(proteins, report=Report(strict=True)))
    if not found:
        raise UserError("The report has no proteins to compare the models on.")
    return found


def check_options(dtype: str | None, quantize: bool, dequantize: bool, **spec: Any) -> None:
    """Check options that can be checked before anything is read.

    Raises:
        ValueError: an unknown dtype, or options that contradict each other.
    """
    if dtype is not None:
        check_choice("dtype", dtype, STORED_DTYPES)
    if quantize and dequantize:
        raise UserError("Pass either quantize or dequantize, not both.")
    if given := [name for name, value in spec.items() if value not in (None, {}) and not quantize]:
        raise UserError(f"{', '.join(given)}: only valid with quantize.")


def spec_of_rule(how: How, usual: QuantSpec) -> QuantSpec | None:
    """Return the spec of a rule.

    Raises:
        ValueError: MLX does not support it.
    """
    if how is None:
        return None
    if isinstance(how, str):
        return make_spec(mode=how)
    activation_dtype = usual.activation_dtype if how in INTEGER_BITS else None
    return make_spec(how, usual.group_size if usual.mode == "affine" else None, activation_dtype=activation_dtype)


def class_of(config: dict[str, Any], source: str) -> Any:
    """Return the auto class that loads everything in a checkpoint, its head included.

    Raises:
        ValueError: the config does not name its architecture.
    """
    if not config.get("architectures"):
        raise UserError(
            f"The config.json of {source} has no `architectures`, so its head would be lost. Add it, such as "
            '"architectures": ["EsmForMaskedLM"].'
        )
    return CLASSES[task_head(config)]


def quantize_layers(model: MLXPreTrainedModel, usual: QuantSpec, rules: Mapping[str, QuantSpec | None]) -> list[str]:
    """Quantize the layers of a model and return notes about it.

    Raises:
        ValueError: a rule matches no layer, or no layer can be quantized.
    """
    specs, too_narrow = choose_specs(model, usual, rules)
    if not specs:
        widths = f" No group size divides the widths {sorted(set(too_narrow.values()))}." if too_narrow else ""
        raise UserError(f"No layer can be quantized.{widths}")
    replace_layers(model, specs)
    counts = Counter(specs.values()).most_common()
    kinds = [f"{count} to {p.bits} bits in groups of {p.group_size} ({kind_of(p)})" for p, count in counts]
    notes = [f"{len(specs)} layers are quantized: {', '.join(kinds)}."]
    if too_narrow:
        notes.append(f"In full precision, because no group size divides their width: {', '.join(too_narrow)}.")
    return notes


def kind_of(spec: QuantSpec) -> str:
    """Return the mode of a spec, and its activation dtype if it has one."""
    return spec.mode if spec.activation_dtype is None else f"{spec.mode}, activation_dtype {spec.activation_dtype}"


def stored_dtype(source: str, revision: str) -> mx.Dtype:
    """Return the dtype of a checkpoint's floating-point arrays, for configs that lack it."""
    for path in checkpoint_files(source, revision=revision):
        for array in load_file(path).values():
            if mx.issubdtype(array.dtype, mx.floating):
                return array.dtype
    return mx.float32


def given_parameters(model: MLXPreTrainedModel) -> dict[str, mx.array]:
    """Return the parameters that the source has. Those it lacks are random and are not written."""
    return {name: array for name, array in model.state_dict().items() if name not in model.newly_initialized}


def copy_others(source: str, revision: str, folder: Path) -> None:
    """Copy the tokenizer and the licence."""
    for name in COPIED:
        if path := find_file(source, name, revision=revision):
            shutil.copyfile(path, folder / name)


def weights_size(place: str, revision: str) -> int:
    """Return the size of a checkpoint's weight files in bytes."""
    return sum(os.path.getsize(path) for path in checkpoint_files(place, revision=revision))


def origin(source: str, revision: str) -> str:
    """Return where a checkpoint comes from, for publication: a Hub id with its commit, or just the folder's name."""
    if (repo_id := hub_id(source)) is None:
        return Path(source).resolve().name
    commit = getattr(revision, "resolved", None) or revision
    return f"{repo_id} ({commit[:12]})"
