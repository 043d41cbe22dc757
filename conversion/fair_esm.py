"""Convert a checkpoint of fair-esm (https://github.com/facebookresearch/esm) to a Hugging Face folder.

    python conversion/fair_esm.py esm2_t6_8M_UR50D.pt esm2_t6_8M_UR50D

Reads ESM-1, ESM-1b, ESM-1v and ESM-2 like fair-esm's loader (esm/pretrained.py), but runs no code from the file and
needs neither torch nor fair-esm. The contact head comes from `NAME-contact-regression.pt` next to `NAME.pt`. Weights
keep their dtype, and are in memory only once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub.errors import StrictDataclassError
from transformers.models.esm.configuration_esm import get_default_vocab_list

from mlx_esm_hf import Esm1Tokenizer, EsmTokenizer, MLXEsm1Config, MLXEsmConfig, MLXEsmForMaskedLM
from mlx_esm_hf.checkpoint.torch_bin import load_torch_checkpoint
from mlx_esm_hf.checkpoint.write import stale_weights
from mlx_esm_hf.errors import CheckpointError
from mlx_esm_hf.runtime.files import replace_files

PAD, MASK = 1, 32  # token ids of ESM-1b, ESM-1v and ESM-2


def convert(checkpoint: Path, output: Path) -> MLXEsmForMaskedLM:
    """Write `config.json`, `model.safetensors` and the tokenizer files into the folder `output`.

    Returns:
        The model, as from `read`. If it has no contact head, loading the folder reports that.

    Raises:
        CheckpointError: as in `read`.
        OSError: a file cannot be read or written.
    """
    model = read(checkpoint)
    with replace_files(output, stale_weights()) as folder:
        write_tokenizer(model.config, folder)
        model.save_pretrained(folder)
    return model


def read(checkpoint: Path) -> MLXEsmForMaskedLM:
    """Read the model of a checkpoint, in its dtype. `esm.contact_head` is None if there is no regression file.

    Raises:
        CheckpointError: the file is damaged or malicious, or is not a complete checkpoint of one of these models.
        OSError: a file cannot be read.
    """
    state, settings = load_torch_checkpoint(checkpoint)
    state = {bare_name(key): array for key, array in state.items()}
    try:
        model = MLXEsmForMaskedLM(make_config(settings, state))
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise CheckpointError(
            f"{checkpoint} is not a checkpoint of ESM-1, ESM-1b, ESM-1v or ESM-2: {reason}."
        ) from error
    if model.config.position_embedding_type == "absolute":
        # Token dropout needs this. It also zeroes the output projection if the file stores both as one tensor.
        state["embed_tokens.weight"][MASK] = 0
    # fair-esm has one parameter for both and loads the output projection last.
    state["embed_tokens.weight"] = state.pop("lm_head.weight", state["embed_tokens.weight"])

    model.to(state["embed_tokens.weight"].dtype)
    regression = regression_file(checkpoint)
    if regression.exists():
        state |= load_torch_checkpoint(regression)[0]
        model.esm.contact_head.set_dtype(mx.float32)  # the dtype of that file, even if the model is in half precision
    else:
        model.esm.contact_head = None
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    return model


def bare_name(key: str) -> str:
    """Return a parameter's name in fair-esm, without the prefixes of fairseq modules that its files have."""
    for prefix in ("encoder.", "decoder.", "sentence_encoder."):
        key = key.removeprefix(prefix)
    return key


def regression_file(checkpoint: Path) -> Path:
    """Return the path of the contact head's weights."""
    return checkpoint.with_name(f"{checkpoint.stem}-contact-regression.pt")


def make_config(settings: dict[str, Any], state: dict[str, mx.array]) -> MLXEsmConfig:
    """Return the config, equal to that of the published repository if there is one.

    Args:
        settings: everything in the checkpoint except the weights.
        state: the weights, with fair-esm's names.

    Raises:
        KeyError: a setting or the embeddings are missing.
        TypeError, ValueError, StrictDataclassError: a setting is invalid, or does not fit the weights.
    """
    if "cfg" in settings:
        config = esm2_config(without_prefix(settings["cfg"]["model"], "encoder_"))
    elif settings["args"]["arch"] == "protein_bert_base":
        config = esm1_config(without_prefix(settings["args"], "decoder_"))
    elif settings["args"]["arch"] == "roberta_large":
        layer_norm = any(key.startswith("emb_layer_norm_before.") for key in state)
        config = esm1b_config(without_prefix(settings["args"], "encoder_"), layer_norm)
    else:
        raise ValueError(f"its architecture is {settings['args']['arch']!r}")
    # Checked before building a model, which could be of any size.
    layers = len({key.split(".")[1] for key in state if key.startswith("layers.")})
    table = (config.vocab_size, config.hidden_size)
    if config.num_hidden_layers != layers or state["embed_tokens.weight"].shape != table:
        raise ValueError(
            f"its settings describe {config.num_hidden_layers} layers and embeddings of shape {table}, but its weights "
            f"have {layers} layers and embeddings of shape {state['embed_tokens.weight'].shape}"
        )
    return config


def without_prefix(settings: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return the settings with a prefix removed from their names."""
    return {name.removeprefix(prefix): value for name, value in settings.items()}


def esm1_config(args: dict[str, Any]) -> MLXEsmConfig:
    """Return the config of an ESM-1. transformers has no such model."""
    return MLXEsm1Config(
        hidden_size=args["embed_dim"],
        num_hidden_layers=args["layers"],
        num_attention_heads=args["attention_heads"],
        intermediate_size=args["ffn_embed_dim"],
        token_dropout=args.get("token_dropout", False),
        lm_head_bias=args["final_bias"],
    )


def esm1b_config(args: dict[str, Any], emb_layer_norm_before: bool) -> MLXEsmConfig:
    """Return the config of ESM-1b or ESM-1v. They differ in the layer norm after the embeddings."""
    return esm_config(
        args,
        intermediate_size=args["ffn_embed_dim"],
        position_embedding_type="absolute",
        max_position_embeddings=args["max_positions"] + PAD + 1,
        emb_layer_norm_before=emb_layer_norm_before,
        token_dropout=args.get("token_dropout", False),
    )


def esm2_config(cfg: dict[str, Any]) -> MLXEsmConfig:
    """Return the config of an ESM-2."""
    return esm_config(
        cfg,
        intermediate_size=4 * cfg["embed_dim"],
        position_embedding_type="rotary",
        emb_layer_norm_before=False,
        token_dropout=cfg["token_dropout"],
    )


def esm_config(settings: dict[str, Any], **fields: Any) -> MLXEsmConfig:
    """Return a config with the common settings of ESM-1b, ESM-1v and ESM-2."""
    return MLXEsmConfig(
        vocab_size=len(get_default_vocab_list()),
        pad_token_id=PAD,
        mask_token_id=MASK,
        hidden_size=settings["embed_dim"],
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["attention_heads"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-5,
        **fields,
    )


def write_tokenizer(config: MLXEsmConfig, output: Path) -> None:
    """Write the tokenizer of the model into a folder."""
    if isinstance(config, MLXEsm1Config):
        Esm1Tokenizer().save_pretrained(output)
    else:
        vocabulary = output / "vocab.txt"
        vocabulary.write_text("\n".join(get_default_vocab_list()), encoding="utf-8")
        EsmTokenizer(vocabulary).save_pretrained(output)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Convert a checkpoint of fair-esm to a Hugging Face folder.")
    parser.add_argument(
        "checkpoint", type=Path, help="a .pt file; its -contact-regression.pt must be in the same folder"
    )
    parser.add_argument("output", type=Path, help="the folder to write")
    options = parser.parse_args()
    try:
        model = convert(options.checkpoint, options.output)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.output}: {model.num_parameters():,} parameters, {str(model.dtype).rpartition('.')[2]}")
    if model.esm.contact_head is None:
        name = options.checkpoint.name
        why = "ESM-1v has none" if "esm1v" in name else f"{regression_file(options.checkpoint)} not found"
        print(f"It has no contact head ({why}): loading reports this, and it cannot predict contacts.")


if __name__ == "__main__":
    main()
