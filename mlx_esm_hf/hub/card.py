"""The model card of what is published, from the checkpoint itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from yaml import YAMLError

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.hub.files import REPORT, Checkpoint, is_quantized
from mlx_esm_hf.version import __version__

# The Hub's name of a task, by the ending of the architecture; the auto classes have the same endings.
TASKS = {
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "": "feature-extraction",
}
# A card with this line is written anew.
OURS = "<!-- mlx-esm writes this card anew with each push. Delete this line to keep what you write here. -->"
# What transformers says in the card that it makes of a template when a tokenizer or a config is pushed first.
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
    """A card that says what the model is and how to load it.

    Args:
        tokenizer: whether the repository has one.
        base_model: the id of the model that this one was made from.
        license: the Hub's name of it, such as "mit".
        tags: further ones.
        earlier: the card in whose place this one comes; what its metadata say besides is kept.
    """
    config, head = checkpoint.config, task_head(checkpoint.config)
    known = earlier.data.to_dict() if earlier else {}
    base_model = base_model or known.get("base_model")
    every_tag = ["mlx", "protein", config["model_type"], *(tags or []), *(known.get("tags") or [])]
    ours = {
        "library_name": "transformers" if loads_in_transformers(config) else "mlx",
        "pipeline_tag": TASKS[head],
        "base_model": base_model,
        "license": license or known.get("license"),
        "tags": list(dict.fromkeys(every_tag)),
    }
    data = ModelCardData(**(known | ours))
    made_from = ""
    if isinstance(base_model, str):  # it may be a list in metadata that somebody wrote
        made_from = f" Made from [{base_model}](https://huggingface.co/{base_model})."
    parts = [
        OURS,
        f"# {repo_id.rpartition('/')[2]}",
        f"A protein language model: {describe(checkpoint)}.{made_from}",
        "## How to load it",
        "On [MLX](https://github.com/ml-explore/mlx), with `pip install mlx-esm-hf` (on Linux `mlx-esm-hf[cpu]` or "
        "`mlx-esm-hf[cuda13]`):",
        code("mlx_esm_hf", f"MLXAutoModel{head}", repo_id, tokenizer),
    ]
    if loads_in_transformers(config):
        parts += ["On torch, with transformers:", code("transformers", f"AutoModel{head}", repo_id, tokenizer)]
    else:
        parts.append(f"transformers cannot load it: {why_not(config)}.")
    if REPORT in checkpoint.files:
        parts += ["## Conversion", (checkpoint.folder / REPORT).read_text(encoding="utf-8").strip()]
    parts.append(f"Published with mlx-esm-hf {__version__}.")
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def load_card(path: str | Path) -> Any:
    """
    Raises:
        ValueError: the metadata at its beginning are not YAML.
    """
    try:
        return ModelCard.load(path)
    except (YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: the lines between the two --- are not YAML of a model card ({reason}).") from error


def is_generated(card: ModelCard) -> bool:
    """Whether a card is one of ours, or transformers' template as it is."""
    template = ModelCard.from_template(ModelCardData(), model_description=THEIRS)
    return OURS in card.text or card.text.strip() == template.text.strip()


def task_head(config: dict[str, Any]) -> str:
    """The ending of the architecture, such as "ForMaskedLM"; "" for a model without a head."""
    architecture = (config.get("architectures") or [""])[0]
    return next((ending for ending in TASKS if ending and architecture.endswith(ending)), "")


def loads_in_transformers(config: dict[str, Any]) -> bool:
    """Whether transformers reads a checkpoint with this config."""
    return config["model_type"] in CONFIG_MAPPING_NAMES and not is_quantized(config)


def why_not(config: dict[str, Any]) -> str:
    """Why transformers does not."""
    if is_quantized(config):
        return "it is quantized for MLX"
    return f"it has no model_type {config['model_type']!r}"


def describe(checkpoint: Checkpoint) -> str:
    """Architecture, size and precision, in half a sentence."""
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


def code(library: str, auto_class: str, repo_id: str, tokenizer: bool) -> str:
    """The lines that load a model, and run it where its tokenizer is there."""
    lines = [f"from {library} import {auto_class}", "", f'model = {auto_class}.from_pretrained("{repo_id}")']
    if tokenizer:
        tensors = "mlx" if library == "mlx_esm_hf" else "pt"
        lines.insert(0, "from transformers import AutoTokenizer")
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")')
        lines.append(f'outputs = model(**tokenizer("MQIFVKTLTGKTITLEVEPS", return_tensors="{tensors}"))')
    if tokenizer and library == "transformers":
        lines[:2] = [f"from transformers import {auto_class}, AutoTokenizer"]
    return "```python\n" + "\n".join(lines) + "\n```"
