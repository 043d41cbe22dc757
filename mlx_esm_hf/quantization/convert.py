"""A checkpoint in another precision: cast, quantized or dequantized, and compared with what it was made from."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from transformers import AutoTokenizer
from transformers.utils.hub import resolve_revision

from mlx_esm_hf.checkpoint.read import load_file
from mlx_esm_hf.checkpoint.resolve import checkpoint_files, find_file
from mlx_esm_hf.checkpoint.write import save_safetensors
from mlx_esm_hf.data.proteins import Protein, Report
from mlx_esm_hf.data.source import Proteins, read_proteins
from mlx_esm_hf.dtypes import STORED_DTYPES
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.hub.card import task_head
from mlx_esm_hf.hub.files import CARD, CONFIG, FIGURES, OTHERS, REPORT
from mlx_esm_hf.hub.publish import Publication, hub_id, publish
from mlx_esm_hf.jobs.protein_model import load_network
from mlx_esm_hf.loading import read_config
from mlx_esm_hf.modeling_utils import MLXPreTrainedModel
from mlx_esm_hf.models.auto import (
    MLXAutoModel,
    MLXAutoModelForMaskedLM,
    MLXAutoModelForSequenceClassification,
    MLXAutoModelForTokenClassification,
)
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
from mlx_esm_hf.runtime.files import new_folder
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
    """What `convert` did.

    Attributes:
        notes: in sentences.
        rows: (what, before, after), a table.
        publication: what was published, if anything was.
    """

    notes: list[str]
    rows: list[Row] = field(default_factory=list)
    publication: Publication | None = None

    def markdown(self) -> str:
        """For the model card."""
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
    """Write a checkpoint in another precision, with its tokenizer beside it. Arrays are read, converted and written one
    by one, so that little more than the largest is in memory. Of a source in `.bin` that is so where there are kernels.

    Without `quantize` or `dequantize` a checkpoint is written anew, in safetensors and under the published keys.

    Args:
        source: a repository on the Hub, or a folder.
        output: a folder that is not there yet, or empty.
        dtype: "float32", "float16" or "bfloat16", of what is not packed; by default the source's own.
        quantize: pack the weights of the encoder. Embeddings, heads and the contact head stay as they are.
        bits, group_size, mode: how, as in `mlx.core.quantize`; by default 4 bits in groups of 64. A layer whose width
            the groups do not divide has smaller ones, and stays in full precision if there are none that do.
        activation_dtype: "int8": what the packed layers are given is rounded to 8 bits, with a scale for each token and
            group, whenever the model runs. For 4 and 8 bits; faster on a CPU than weights alone.
        rules: {pattern of the path of a layer, as in a shell: bits (affine), a mode, or None for full precision}, such
            as {"lm_head.*": 8, "*.layer.0.*": None}. The last one that fits counts.
        dequantize: make a plain checkpoint of a quantized one, which transformers loads.
        max_shard_size: in bytes, or such as "5GB".
        revision: branch, tag or commit of the source.
        report: proteins, see `read_proteins`, on which the result is compared with the source, one after the other
            (`fidelity.compare`). The numbers are in CONVERSION.json, too.
        upload_repo: publish the result there, see `mlx_esm_hf.hub.publish`.

    Raises:
        ValueError: options that do not go together, a spec that MLX does not have, a rule that fits no layer.
        OSError: no such source, or `output` holds something; the Hub refused.
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
    exceptions = {pattern: packing_by(how, usual) for pattern, how in (rules or {}).items()}
    commit = resolve_revision(source, revision or "main") or "main"
    config = read_config(source, revision=commit)
    if (quantize or dequantize) and bool(config.get("quantization")) == quantize:
        raise UserError(f"{source} is {'quantized already' if quantize else 'not quantized'}.")
    cls = class_of(config, source)
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
            conversion.notes.append("The weights were dequantized: they are as coarse as they were.")
        whole = "Other weights" if block_of(model) else "The weights"
        conversion.notes.append(f"{whole} are {model.config.dtype}.")
        parameters = model.num_parameters()
        written, state = model.to_save(given_parameters(model))
        del model
        gc.collect()  # parts of a model refer to it, and while it lives it holds all that is computed
        save_safetensors(state, folder, max_shard_size)
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


def read_for_report(proteins: Proteins, source: str, revision: str) -> list[Protein]:
    """The proteins; that the report can be made turns out before the work.

    Raises:
        ValueError: there are none, or some cannot be read.
        OSError: there is no such file, or the source has no tokenizer.
    """
    AutoTokenizer.from_pretrained(source, revision=revision)
    found = list(read_proteins(proteins, report=Report(strict=True)))
    if not found:
        raise UserError("There are no proteins to compare the models on.")
    return found


def check_options(dtype: str | None, quantize: bool, dequantize: bool, **spec: Any) -> None:
    """
    Raises:
        ValueError: an unknown dtype, or options that do not go together.
    """
    if dtype is not None and dtype not in STORED_DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(STORED_DTYPES)}.")
    if quantize and dequantize:
        raise UserError("quantize and dequantize are opposites: choose one.")
    if given := [name for name, value in spec.items() if value and not quantize]:
        raise UserError(f"{', '.join(given)}: how to quantize, but quantize was not asked for.")


def packing_by(how: How, usual: QuantSpec) -> QuantSpec | None:
    """The spec that a rule asks for.

    Raises:
        ValueError: MLX has no such spec.
    """
    if how is None:
        return None
    if isinstance(how, str):
        return make_spec(mode=how)
    activation_dtype = usual.activation_dtype if how in INTEGER_BITS else None
    return make_spec(how, usual.group_size if usual.mode == "affine" else None, activation_dtype=activation_dtype)


def class_of(config: dict[str, Any], source: str) -> Any:
    """The class that loads all that a checkpoint holds.

    Raises:
        ValueError: the config does not say what it is.
    """
    if not config.get("architectures"):
        raise UserError(
            f"The config.json of {source} names no architectures, so its head would be lost. Add what it is, such as "
            '"architectures": ["EsmForMaskedLM"].'
        )
    return CLASSES[task_head(config)]


def quantize_layers(model: MLXPreTrainedModel, usual: QuantSpec, rules: Mapping[str, QuantSpec | None]) -> list[str]:
    """Pack the layers of a model; returns what there is to say of it.

    Raises:
        ValueError: a rule fits no layer, or no layer can be packed.
    """
    specs, too_narrow = choose_specs(model, usual, rules)
    if not specs:
        widths = f" The groups divide none of the widths {sorted(set(too_narrow.values()))}." if too_narrow else ""
        raise UserError(f"There is nothing to quantize.{widths}")
    replace_layers(model, specs)
    counts = Counter(specs.values()).most_common()
    kinds = [f"{count} to {p.bits} bits in groups of {p.group_size} ({kind_of(p)})" for p, count in counts]
    notes = [f"{len(specs)} layers are quantized: {', '.join(kinds)}."]
    if too_narrow:
        notes.append(f"In full precision, since no group divides their width: {', '.join(too_narrow)}.")
    return notes


def kind_of(spec: QuantSpec) -> str:
    return spec.mode if spec.activation_dtype is None else f"{spec.mode}, activation_dtype {spec.activation_dtype}"


def stored_dtype(source: str, revision: str) -> mx.Dtype:
    """That of a checkpoint's floating arrays, where its config does not say it."""
    for path in checkpoint_files(source, revision=revision):
        for array in load_file(path).values():
            if mx.issubdtype(array.dtype, mx.floating):
                return array.dtype
    return mx.float32


def given_parameters(model: MLXPreTrainedModel) -> dict[str, mx.array]:
    """Those parameters that the source gave. What it lacks was drawn at random when the model was made."""
    return {name: array for name, array in model.state_dict().items() if name not in model.newly_initialized}


def copy_others(source: str, revision: str, folder: Path) -> None:
    """Copy tokenizer and licence."""
    for name in COPIED:
        if path := find_file(source, name, revision=revision):
            shutil.copyfile(path, folder / name)


def weights_size(place: str, revision: str) -> int:
    """Bytes of the files of a checkpoint's weights."""
    return sum(os.path.getsize(path) for path in checkpoint_files(place, revision=revision))


def origin(source: str, revision: str) -> str:
    """Where a checkpoint is from, as the world may know it: of a folder its name alone."""
    if (repo_id := hub_id(source)) is None:
        return Path(source).resolve().name
    commit = getattr(revision, "resolved", None) or revision
    return f"{repo_id} ({commit[:12]})"
