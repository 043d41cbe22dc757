"""Model cards, written from the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from yaml import YAMLError

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.hub.files import REPORT, Checkpoint, is_quantized
from mlx_esm_hf.version import __version__

# The Hub's name of a task, by the suffix of the architecture. The auto classes have the same suffixes.
TASKS = {
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "": "feature-extraction",
}
# What a model reads and an example of it, by a token that its vocabulary has. The first match counts.
SEQUENCES = {
    "M": ("protein", "MQIFVKTLTGKTITLEVEPS"),
    "M#": ("protein", "MdQvIpFq"),  # pairs of a residue and a structure letter
    "ATTCCG": ("DNA", "ATTCCGATTCCGATTCCG"),
    "p": ("protein structure", "dvvlpcvqdp"),
}
# {architecture that predicts structures: its method that returns a PDB file}
FOLDING = {"EsmForProteinFolding": "infer_pdb", "EsmFold2Model": "infer_protein_as_pdb"}
# A card with this line is overwritten by the next push.
OURS = "<!-- mlx-esm overwrites this card with each push. Delete this line to keep your edits. -->"
# The text in transformers' template, which it writes if a tokenizer or a config is pushed first.
THEIRS = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)


def write_card(
    checkpoint: Checkpoint,
    repo_id: str,
    *,
    tokenizer: bool,
    base_model: str | None = None,
    license: str | None = None,
    tags: list[str] | None = None,
    earlier: ModelCard | None = None,
) -> ModelCard:
    """Return a card that says what the model is and how to load it.

    Args:
        checkpoint: the checkpoint.
        repo_id: id of the repository.
        tokenizer: whether the repository has a tokenizer.
        base_model: id of the model that this one was made from.
        license: the Hub's name of the license, such as "mit".
        tags: additional tags.
        earlier: the card that this one replaces. Its other metadata is kept.
    """
    config, head = checkpoint.config, task_head(checkpoint.config)
    metadata = earlier.data.to_dict() if earlier else {}
    base_model = base_model or metadata.get("base_model")
    kind, example = sequences_of(checkpoint)
    all_tags = ["mlx", kind.replace(" ", "-"), config["model_type"], *(tags or []), *(metadata.get("tags") or [])]
    ours = {
        "library_name": "transformers" if loads_in_transformers(config) else "mlx",
        "pipeline_tag": TASKS[head],
        "base_model": base_model,
        "license": license or metadata.get("license"),
        "tags": list(dict.fromkeys(all_tags)),
    }
    data = ModelCardData(**(metadata | ours))
    made_from = ""
    if isinstance(base_model, str):  # metadata written by hand may contain a list
        made_from = f" Made from [{base_model}](https://huggingface.co/{base_model})."
    architecture = (config.get("architectures") or [""])[0]
    folds = architecture in FOLDING
    classes = (f"MLX{architecture}", architecture) if folds else (f"MLXAutoModel{head}", f"AutoModel{head}")
    parts = [
        OURS,
        f"# {repo_id.rpartition('/')[2]}",
        f"A {kind} {'structure' if folds else 'language'} model: {describe(checkpoint)}.{made_from}",
        "## Usage",
        "With [MLX](https://github.com/ml-explore/mlx): `pip install mlx-esm-hf` (on Linux `mlx-esm-hf[cpu]` or "
        "`mlx-esm-hf[cuda13]`), then",
        code("mlx_esm_hf", classes[0], repo_id, example if tokenizer else "", FOLDING.get(architecture)),
    ]
    if loads_in_transformers(config):
        parts += [
            "With transformers, on torch:",
            code("transformers", classes[1], repo_id, example if tokenizer else "", FOLDING.get(architecture)),
        ]
    else:
        parts.append(f"transformers cannot load this model: {why_not(config)}.")
    if REPORT in checkpoint.files:
        parts += ["## Conversion", (checkpoint.folder / REPORT).read_text(encoding="utf-8").strip()]
    parts.append(f"Published with mlx-esm-hf {__version__}.")
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def load_card(path: str | Path) -> Any:
    """Load a card.

    Raises:
        ValueError: the metadata at its beginning is not YAML.
    """
    try:
        return ModelCard.load(path)
    except (YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: the metadata between the --- lines is not valid YAML ({reason}).") from error


def is_generated(card: ModelCard) -> bool:
    """Return whether a card was written by this package, or is transformers' template without edits."""
    template = ModelCard.from_template(ModelCardData(), model_description=THEIRS)
    return OURS in card.text or card.text.strip() == template.text.strip()


def task_head(config: dict[str, Any]) -> str:
    """Return the suffix of the architecture, such as "ForMaskedLM"; "" for a model without a head."""
    architecture = (config.get("architectures") or [""])[0]
    return next((suffix for suffix in TASKS if suffix and architecture.endswith(suffix)), "")


def loads_in_transformers(config: dict[str, Any]) -> bool:
    """Return whether transformers can load a checkpoint with this config."""
    return config["model_type"] in CONFIG_MAPPING_NAMES and not is_quantized(config)


def why_not(config: dict[str, Any]) -> str:
    """Return why transformers cannot load a checkpoint with this config."""
    if is_quantized(config):
        return "it is quantized for MLX"
    return f"it does not know the model_type {config['model_type']!r}"


def describe(checkpoint: Checkpoint) -> str:
    """Return the architecture, size and precision as part of a sentence."""
    config = checkpoint.config
    words = [", ".join(config.get("architectures") or [config["model_type"]])]
    if checkpoint.parameters:
        words.append(f"{checkpoint.parameters:,} parameters")
    if config.get("num_hidden_layers"):
        words.append(f"{config['num_hidden_layers']} layers of width {config.get('hidden_size')}")
    spec = config.get("quantization") or config.get("quantization_config") or {}
    if spec.get("bits"):
        words.append(f"quantized to {spec['bits']} bits in groups of {spec.get('group_size')}")
    elif config.get("dtype") or config.get("torch_dtype"):
        words.append(str(config.get("dtype") or config.get("torch_dtype")))
    return ", ".join(words)


def sequences_of(checkpoint: Checkpoint) -> tuple[str, str]:
    """Return what a model reads, such as "protein", and an example sequence; a protein if there is no `vocab.txt`."""
    path = checkpoint.folder / "vocab.txt"
    tokens = set(path.read_text(encoding="utf-8").split()) if path.is_file() else set()
    return next((found for token, found in SEQUENCES.items() if token in tokens), SEQUENCES["M"])


def code(library: str, model_class: str, repo_id: str, example: str, fold: str | None = None) -> str:
    """Return a Markdown code block that loads a model, and runs it on an example sequence unless that is empty.

    Args:
        library: the package.
        model_class: a class of it.
        repo_id: the repository.
        example: a sequence, or "".
        fold: method that returns a PDB file; None for a model that does not fold.
    """
    lines = [f"from {library} import {model_class}", "", f'model = {model_class}.from_pretrained("{repo_id}")']
    if fold:
        lines.append(f'pdb = model.{fold}("{SEQUENCES["M"][1]}")')
    elif example:
        tensors = "mlx" if library == "mlx_esm_hf" else "pt"
        lines.insert(0, "from transformers import AutoTokenizer")
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")')
        lines.append(f'outputs = model(**tokenizer("{example}", return_tensors="{tensors}"))')
    if example and library == "transformers" and not fold:
        lines[:2] = [f"from transformers import {model_class}, AutoTokenizer"]
    return "```python\n" + "\n".join(lines) + "\n```"
