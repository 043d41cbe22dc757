"""Checkpoints in the format of fair-esm's published files, and fair-esm's loader."""

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import esm
import pytest
import torch

# {name of a published model: (layers, hidden size, attention heads)}
PUBLISHED = {
    "esm1_t6_43M_UR50S": (6, 768, 12),
    "esm1_t12_85M_UR50S": (12, 768, 12),
    "esm1_t34_670M_UR50S": (34, 1280, 20),
    "esm1_t34_670M_UR50D": (34, 1280, 20),
    "esm1_t34_670M_UR100": (34, 1280, 20),
    "esm1b_t33_650M_UR50S": (33, 1280, 20),
    **{f"esm1v_t33_650M_UR90S_{number}": (33, 1280, 20) for number in range(1, 6)},
    "esm2_t6_8M_UR50D": (6, 320, 20),
    "esm2_t12_35M_UR50D": (12, 480, 20),
    "esm2_t30_150M_UR50D": (30, 640, 20),
    "esm2_t33_650M_UR50D": (33, 1280, 20),
    "esm2_t36_3B_UR50D": (36, 2560, 40),
    "esm2_t48_15B_UR50D": (48, 5120, 40),
}
FAMILIES = {"ESM-1": "esm1_tiny", "ESM-1b": "esm1b_tiny", "ESM-1v": "esm1v_tiny", "ESM-2": "esm2_tiny"}


def build(name: str, layers: int, hidden_size: int, heads: int) -> torch.nn.Module:
    """Return a model of fair-esm with random weights. The name determines the family."""
    if name.startswith("esm2"):
        return esm.ESM2(layers, hidden_size, heads, "ESM-1b", token_dropout=True)
    args = Namespace(layers=layers, embed_dim=hidden_size, ffn_embed_dim=4 * hidden_size, attention_heads=heads)
    if name.startswith("esm1_"):
        args.arch, args.final_bias = "protein_bert_base", True
        return esm.ProteinBertModel(args, esm.Alphabet.from_architecture("ESM-1"))
    args.arch, args.max_positions, args.token_dropout = "roberta_large", 1024, True
    args.emb_layer_norm_before = name.startswith("esm1b")
    return esm.ProteinBertModel(args, esm.Alphabet.from_architecture("ESM-1b"))


def settings_of(model: torch.nn.Module) -> dict:
    """Return the settings that fair-esm's loader reads from a file of this model."""
    if isinstance(model, esm.ESM2):
        cfg = Namespace(
            _name="esm2",
            encoder_layers=model.num_layers,
            encoder_embed_dim=model.embed_dim,
            encoder_attention_heads=model.attention_heads,
            token_dropout=model.token_dropout,
            decoder_layers=99,
        )
        return {"cfg": {"_name": None, "common": {"seed": 1, "fp16": True}, "model": cfg}}
    ours, other = ("decoder_", "encoder_") if model.args.arch == "protein_bert_base" else ("encoder_", "decoder_")
    known = {k: v for k, v in vars(model.args).items() if k != "emb_layer_norm_before"}
    prefixed = {
        (ours + k if k in ("layers", "embed_dim", "ffn_embed_dim", "attention_heads") else k): v
        for k, v in known.items()
    }
    args = Namespace(**prefixed, lr=[0.0001], adam_betas="(0.9, 0.98)", update_freq=(4, 8), distributed_rank=0)
    args.user_dir, args.nested, args.dropout = None, {"deep": [Namespace(x=1)]}, 0.1
    setattr(args, f"{other}embed_dim", 7)
    setattr(args, f"{other}layers", 99)
    return {"args": args}


def file_names(model: torch.nn.Module, state: dict) -> dict:
    """Return a state dict with the names used in files."""
    if not isinstance(model, esm.ESM2) and model.args.arch == "protein_bert_base":
        return {f"decoder.{key}": tensor for key, tensor in state.items()}
    return {
        ("encoder." if key.startswith("lm_head.") else "encoder.sentence_encoder.") + key: tensor
        for key, tensor in state.items()
    }


def save(model: torch.nn.Module, path: Path, format: str = "zip", regression: bool = True, more: Any = None) -> Path:
    """Write a model of fair-esm in the format of its published files and return the path.

    Args:
        model: the model.
        path: the file to write.
        format: "zip", or torch's older format.
        regression: whether to write the file of the contact head.
        more: entries to add or replace.
    """
    zipped = {"_use_new_zipfile_serialization": format == "zip"}
    state = model.state_dict()
    head = {key: state.pop(key) for key in list(state) if key.startswith("contact_head.")}
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.ones(5)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    data = {**settings_of(model), "model": file_names(model, state), "last_optimizer_state": optimizer, **(more or {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(data, path, **zipped)
    if regression:
        torch.save({"model": head}, path.with_name(f"{path.stem}-contact-regression.pt"), **zipped)
    return path


def load(path: Path) -> tuple[torch.nn.Module, esm.Alphabet]:
    """Load a checkpoint with fair-esm's loader, which does not pass the weights_only=False that torch needs."""
    torch_load = torch.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda file, map_location: torch_load(file, map_location, weights_only=False))
        model, alphabet = esm.pretrained.load_model_and_alphabet_local(path)
    return model.eval(), alphabet


def published_by_fair_esm() -> set[str]:
    """Return the names of fair-esm's functions that load a language model of single sequences."""
    names = {name for name in vars(esm.pretrained) if re.match("esm1_|esm1b_|esm1v_|esm2_", name)}
    return names - {"esm1v_t33_650M_UR90S"}  # an alias of number 1
