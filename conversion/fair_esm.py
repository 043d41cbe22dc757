"""A checkpoint of fair-esm (https://github.com/facebookresearch/esm) becomes a folder in the layout of Hugging Face.

    python conversion/fair_esm.py esm2_t6_8M_UR50D.pt esm2_t6_8M_UR50D

ESM-1, ESM-1b, ESM-1v and ESM-2 are read as fair-esm's own loader reads them (esm/pretrained.py), but nothing in the
file is executed, and neither torch nor fair-esm is needed. The contact head comes from `NAME-contact-regression.pt`
beside `NAME.pt`. Weights keep their dtype, and are in memory once.
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
from mlx_esm_hf.errors import CheckpointError

PAD, MASK = 1, 32  # of the alphabet of ESM-1b, ESM-1v and ESM-2


def convert(checkpoint: Path, output: Path) -> MLXEsmForMaskedLM:
    """Write `config.json`, `model.safetensors` and the files of the tokenizer into the folder `output`.

    Returns:
        The model, as `read` does. Without a contact head the folder has none either, which whoever loads it is told.

    Raises:
        CheckpointError, OSError: as `read` does, and where the folder cannot be written.
    """
    model = read(checkpoint)
    write_tokenizer(model.config, output)
    model.save_pretrained(output)
    return model


def read(checkpoint: Path) -> MLXEsmForMaskedLM:
    """The model of a checkpoint, in its dtype. Its `esm.contact_head` is None where there is no regression file.

    Raises:
        CheckpointError: a damaged or hostile file, or not a whole checkpoint of one of these models.
        OSError: a file cannot be read.
    """
    state, settings = load_torch_checkpoint(checkpoint)
    state = {bare_name(key): array for key, array in state.items()}
    try:
        model = MLXEsmForMaskedLM(make_config(settings, state))
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise CheckpointError(f"{checkpoint} is no checkpoint of ESM-1, ESM-1b, ESM-1v or ESM-2: {reason}.") from error
    if model.config.position_embedding_type == "absolute":
        # For token dropout. In the output projection, too, where the file holds both as one tensor.
        state["embed_tokens.weight"][MASK] = 0
    # One parameter in fair-esm, which loads the output projection last.
    state["embed_tokens.weight"] = state.pop("lm_head.weight", state["embed_tokens.weight"])

    model.to(state["embed_tokens.weight"].dtype)
    regression = regression_file(checkpoint)
    if regression.exists():
        state |= load_torch_checkpoint(regression)[0]
        model.esm.contact_head.set_dtype(mx.float32)  # as in that file, also beside a model in half precision
    else:
        model.esm.contact_head = None
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    return model


def bare_name(key: str) -> str:
    """A parameter's name in fair-esm; in its files it has the names of one or two modules of fairseq before it."""
    for prefix in ("encoder.", "decoder.", "sentence_encoder."):
        key = key.removeprefix(prefix)
    return key


def regression_file(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.stem}-contact-regression.pt")


def make_config(settings: dict[str, Any], state: dict[str, mx.array]) -> MLXEsmConfig:
    """The config, equal to that of the published repository where there is one.

    Args:
        settings: what the checkpoint has beside the weights.
        state: the weights, by their names in fair-esm.

    Raises:
        KeyError: a setting is missing, or the embeddings are.
        TypeError, ValueError, StrictDataclassError: a setting has a value that it cannot have, or not that of the
            weights.
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
    # Before a model of any size is built.
    layers = len({key.split(".")[1] for key in state if key.startswith("layers.")})
    table = (config.vocab_size, config.hidden_size)
    if config.num_hidden_layers != layers or state["embed_tokens.weight"].shape != table:
        raise ValueError(
            f"its settings are those of {config.num_hidden_layers} layers and embeddings {table}, but its weights have "
            f"{layers} and {state['embed_tokens.weight'].shape}"
        )
    return config


def without_prefix(settings: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in settings.items()}


def esm1_config(args: dict[str, Any]) -> MLXEsmConfig:
    """ESM-1. transformers has no such model, and the Hub no such config."""
    return MLXEsm1Config(
        hidden_size=args["embed_dim"],
        num_hidden_layers=args["layers"],
        num_attention_heads=args["attention_heads"],
        intermediate_size=args["ffn_embed_dim"],
        token_dropout=args.get("token_dropout", False),
        lm_head_bias=args["final_bias"],
    )


def esm1b_config(args: dict[str, Any], emb_layer_norm_before: bool) -> MLXEsmConfig:
    """ESM-1b and ESM-1v, which differ in the layer norm behind the embeddings."""
    return esm_config(
        args,
        intermediate_size=args["ffn_embed_dim"],
        position_embedding_type="absolute",
        max_position_embeddings=args["max_positions"] + PAD + 1,
        emb_layer_norm_before=emb_layer_norm_before,
        token_dropout=args.get("token_dropout", False),
    )


def esm2_config(cfg: dict[str, Any]) -> MLXEsmConfig:
    return esm_config(
        cfg,
        intermediate_size=4 * cfg["embed_dim"],
        position_embedding_type="rotary",
        emb_layer_norm_before=False,
        token_dropout=cfg["token_dropout"],
    )


def esm_config(settings: dict[str, Any], **fields: Any) -> MLXEsmConfig:
    """What ESM-1b, ESM-1v and ESM-2 have in common."""
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
    output.mkdir(parents=True, exist_ok=True)
    if isinstance(config, MLXEsm1Config):
        Esm1Tokenizer().save_pretrained(output)
    else:
        vocabulary = output / "vocab.txt"
        vocabulary.write_text("\n".join(get_default_vocab_list()), encoding="utf-8")
        EsmTokenizer(vocabulary).save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a checkpoint of fair-esm into the layout of Hugging Face.")
    parser.add_argument("checkpoint", type=Path, help="a .pt file; its -contact-regression.pt is looked for beside it")
    parser.add_argument("output", type=Path, help="a folder")
    options = parser.parse_args()
    try:
        model = convert(options.checkpoint, options.output)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.output}: {model.num_parameters():,} parameters, {str(model.dtype).rpartition('.')[2]}")
    if model.esm.contact_head is None:
        why = "ESM-1v has none" if "esm1v" in options.checkpoint.name else f"no {regression_file(options.checkpoint)}"
        print(f"It has no contact head ({why}): loading it says so, and it predicts no contacts.")


if __name__ == "__main__":
    main()
