"""Checkpoints of the measured models, with random weights. All peers load the same files.

`python -m benchmarks.models NAME FOLDER FASTA` writes one checkpoint and the proteins. It is a separate process, so
that the parent of the workers stays small. With a fourth argument, `converted`, it also writes the `CONVERTED`
checkpoints into folders of their names next to it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

PROTEINS = "proteins.json"


OURS_BFLOAT16 = "ours, bfloat16"
INTEGERS: dict[str, Any] = {"quantize": True, "activation_dtype": "int8"}
CONVERTED: dict[str, dict[str, Any]] = {  # arguments of `convert`
    OURS_BFLOAT16: {"dtype": "bfloat16"},
    "ours, 8 bits, int8": INTEGERS | {"bits": 8},
    "ours, 8 bits, int8, groups of 64": INTEGERS | {"bits": 8, "group_size": 64},
    "ours, 4 bits": {"quantize": True, "bits": 4},
    "ours, 4 bits, int8": INTEGERS | {"bits": 4},
}


class Shape(NamedTuple):
    """The size of a model."""

    layers: int
    hidden: int
    heads: int
    rotary: bool = True
    blocks: int = 0  # of a folding trunk with the widths of ESMFold's
    gated: int = 0  # width of the feed-forward layer of an ESMC; 0 for an ESM
    pair_layers: int = 0  # of an ESMFold2's trunk, next to heads of the published widths; the ESMC is then its stem

    def layer_flops(self, rows: int, length: int) -> int:
        """Return the operations of the matrix products of an ESM layer.

        They are 4 of hidden x hidden, 2 of hidden x 4 hidden, and 2 of length x length x hidden.
        """
        return 2 * rows * length * (12 * self.hidden + 2 * length) * self.hidden


SHAPES = {
    "tiny": Shape(2, 32, 2),  # for tests
    "tiny-ESMC": Shape(2, 32, 2, gated=64),  # for tests
    "8M": Shape(6, 320, 20),
    "35M": Shape(12, 480, 20),
    "150M": Shape(30, 640, 20),
    "650M": Shape(33, 1280, 20),
    "3B": Shape(36, 2560, 40),
    "15B": Shape(48, 5120, 40),
    "ESM-1b": Shape(33, 1280, 20, rotary=False),
    "tiny ESMFold": Shape(1, 32, 2, blocks=1),
    "ESMFold trunk": Shape(1, 32, 2, blocks=4),
    "ESMFold": Shape(36, 2560, 40, blocks=48),
    "ESMC-300M": Shape(30, 960, 15, gated=2560),
    "tiny ESMFold2": Shape(1, 64, 1, gated=64, pair_layers=1),
    "ESMFold2 parts": Shape(1, 64, 1, gated=64, pair_layers=4),
}


DEFAULT = [name for name in SHAPES if name != "ESMFold" and not name.startswith("tiny")]  # ESMFold takes 8.4 GB


def config(shape: Shape) -> dict[str, Any]:
    """Return the published config without dropout, since the random numbers of the peers differ."""
    size = {"num_hidden_layers": shape.layers, "hidden_size": shape.hidden, "num_attention_heads": shape.heads}
    if shape.gated:
        return size | {"intermediate_size": shape.gated}
    return size | {
        "intermediate_size": 4 * shape.hidden,
        "vocab_size": 33,
        "pad_token_id": 1,
        "mask_token_id": 32,
        "max_position_embeddings": 1026,
        "position_embedding_type": "rotary" if shape.rotary else "absolute",
        "emb_layer_norm_before": not shape.rotary,
        "token_dropout": True,
        "layer_norm_eps": 1e-5,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **(folding(shape) if shape.blocks else {}),
    }


def folding(shape: Shape) -> dict[str, Any]:
    """Return the additional settings of a folding model."""
    from transformers.models.esm.configuration_esm import get_default_vocab_list

    trunk = {"num_blocks": shape.blocks, "chunk_size": None}
    return {
        "is_folding_model": True,
        "vocab_list": get_default_vocab_list(),
        "esmfold_config": {"fp16_esm": shape.hidden > 1000, "trunk": trunk},
    }


def write_checkpoint(name: str, folder: Path, fasta: str) -> None:
    """Write a checkpoint with random weights and the sequences of a FASTA file into a folder."""
    import mlx.core as mx

    import mlx_esm_hf
    from mlx_esm_hf import read_proteins
    from mlx_esm_hf.models.esm.tokenization_esm import esm2_tokenizer

    mx.random.seed(0)
    shape = SHAPES[name]
    configuration = (mlx_esm_hf.MLXEsmcConfig if shape.gated else mlx_esm_hf.MLXEsmConfig)(**config(shape))
    if shape.pair_layers:
        parts = {"folding_trunk_num_hidden_layers": shape.pair_layers, "esmc_config": configuration.to_dict()}
        mlx_esm_hf.MLXEsmFold2Model(mlx_esm_hf.MLXEsmFold2Config(**parts)).save_pretrained(folder)
    elif shape.blocks:
        mlx_esm_hf.MLXEsmForProteinFolding(configuration).save_pretrained(folder)
    else:
        mlx_esm_hf.MLXAutoModelForMaskedLM.from_config(configuration).save_pretrained(folder)
    (mlx_esm_hf.EsmcTokenizer() if shape.gated else esm2_tokenizer()).save_pretrained(folder)
    (folder / PROTEINS).write_text(json.dumps([protein.sequence for protein in read_proteins(fasta)]))


def write_converted(folder: Path) -> None:
    """Write the `CONVERTED` versions of a checkpoint next to its folder."""
    from mlx_esm_hf import convert

    for name, options in CONVERTED.items():
        convert(folder, folder.with_name(name), **options)


if __name__ == "__main__":
    model, target, fasta, *more = sys.argv[1:]
    write_checkpoint(model, Path(target), fasta)
    if "converted" in more:
        write_converted(Path(target))
