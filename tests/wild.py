"""Tiny checkpoints with the configs, vocabularies and file formats of public repositories.

`write_wild` writes one with random weights, as its repository stores it, and returns the model in transformers.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from mlx_esm_hf import MLXEsmForMaskedLM
from tests.parity import Peers, randomize
from tests.vocabulary import get_default_vocab_list

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 72}

SIX_MERS = ["".join(letters) for letters in itertools.product("ATCG", repeat=6)]
DNA = ("<unk>", "<pad>", "<mask>", "<cls>", *SIX_MERS, *"ATCGN", "<eos>", "<bos>")
PAIRS = [residue + letter for residue in "ACDEFGHIKLMNPQRSTVWY#" for letter in "pynwrqhgdlvtmfsaeikc#"]
SAPROT = ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>", *PAIRS)
STRUCTURE_LETTERS = ("<cls>", "<pad>", "<eos>", "<unk>", *"pynwrqhgdlvtmfsaeikc", "<mask>")
PROTEIN = tuple(get_default_vocab_list())

# Fields of Meta's repositories.
ESM2 = {
    "architectures": ["EsmForMaskedLM"],
    "model_type": "esm",
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "classifier_dropout": None,
    "hidden_act": "gelu",
    "emb_layer_norm_before": False,
    "esmfold_config": None,
    "initializer_range": 0.02,
    "is_folding_model": False,
    "layer_norm_eps": 1e-05,
    "mask_token_id": 32,
    "max_position_embeddings": 1026,
    "pad_token_id": 1,
    "position_embedding_type": "rotary",
    "token_dropout": True,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_list": None,
    "vocab_size": 33,
    **SIZE,
}
LATER = ("classifier_dropout", "hidden_act", "esmfold_config", "is_folding_model", "vocab_list")  # absent in older ones
OLDER = {name: value for name, value in ESM2.items() if name not in LATER}
ESM1B = {**OLDER, "position_embedding_type": "absolute", "emb_layer_norm_before": True}
NUCLEOTIDES = {
    **{name: value for name, value in ESM2.items() if name not in ("classifier_dropout", "hidden_act")},
    "layer_norm_eps": 1e-12,
    "mask_token_id": 2,
    "max_position_embeddings": 1002,
    "position_embedding_type": "absolute",
    "tie_word_embeddings": False,
    "vocab_size": 4105,
}


@dataclass
class Wild:
    """A checkpoint as a repository has it.

    Attributes:
        config: fields of config.json.
        vocabulary: lines of vocab.txt.
        tokenizer: fields of tokenizer_config.json.
        sequences: text in its alphabet.
        weights: name of the weights file.
        config_text: makes the text of config.json.
        state: makes the arrays of the file from those of the model.
    """

    config: dict[str, Any]
    vocabulary: tuple[str, ...] = PROTEIN
    tokenizer: dict[str, Any] = field(default_factory=dict)
    sequences: tuple[str, ...] = ("MKTAYIAK<mask>RQISFVKSHFSR", "MKX<mask>B")
    weights: str = "model.safetensors"
    config_text: Callable[[dict[str, Any]], str] = json.dumps
    state: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict

    @property
    def task(self) -> str:
        """The suffix of the class, such as "ForMaskedLM"."""
        (architecture,) = self.config["architectures"]
        return next(
            task for task in ("ForSequenceClassification", "Model", "ForMaskedLM") if architecture.endswith(task)
        )


def without(config: dict[str, Any], *names: str, **others: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names} | others


def duplicate_keys(config: dict[str, Any]) -> str:
    """Write fields twice. A JSON parser takes the last value."""
    return "{" + '"pad_token_id": 0, "vocab_size": 5, ' + json.dumps(config)[1:-1] + ', "pad_token_id": 1}'


def with_position_ids(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    rows = state["esm.embeddings.position_embeddings.weight"].shape[0]
    return state | {"esm.embeddings.position_ids": torch.arange(rows, dtype=torch.int64)[None]}


def column_major(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Store matrices by columns, as a framework with transposed weights leaves them."""
    return with_position_ids({key: x.T.contiguous().T if x.ndim == 2 else x for key, x in state.items()})


DNA_TOKENIZER = {"eos_token": None, "model_max_length": 1000}
DNA_SEQUENCES = ("ATTCCGATTCCGATTCC", "ATTCTCTCTCTCTCTGAGATC<mask>ATCGATCGATCNATC")
FAST_ESM = {
    "AutoConfig": "modeling_fastesm.FastEsmConfig",
    "AutoModel": "modeling_fastesm.FastEsmModel",
    "AutoModelForMaskedLM": "modeling_fastesm.FastEsmForMaskedLM",
}

WILD = {
    "nucleotide-transformer-500m": Wild(
        NUCLEOTIDES,
        DNA,
        DNA_TOKENIZER,
        DNA_SEQUENCES,
        "pytorch_model.bin",
        duplicate_keys,
        with_position_ids,
    ),
    "nucleotide-transformer-2.5b": Wild(
        NUCLEOTIDES, DNA, DNA_TOKENIZER, DNA_SEQUENCES, "pytorch_model.bin", json.dumps, column_major
    ),
    "agro-nucleotide-transformer-1b": Wild(
        {**NUCLEOTIDES, "max_position_embeddings": 1026, "hidden_size": 150, "num_attention_heads": 2},  # head size 75
        DNA,
        {**DNA_TOKENIZER, "model_max_length": 1024},
        DNA_SEQUENCES,
        "pytorch_model.bin",
        json.dumps,
        with_position_ids,
    ),
    "zhangtaolab/agront-1b-promoter": Wild(
        {
            **NUCLEOTIDES,
            **{"architectures": ["EsmForSequenceClassification"], "hidden_size": 150, "num_attention_heads": 2},
            **{"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}},
        },
        DNA,
        DNA_TOKENIZER,
        DNA_SEQUENCES,
    ),
    "SaProt_650M_AF2": Wild(
        without(ESM2, *LATER, mask_token_id=4, vocab_size=446),
        SAPROT,
        {},
        ("MdEvVpQp<mask>#dL#KvYd", "M#E#K#"),
        "pytorch_model.bin",
    ),
    "SaProt_1.3B_AF2": Wild(
        without(ESM2, *LATER, mask_token_id=4, vocab_size=446, num_hidden_layers=66),
        SAPROT,
        {},
        ("MdEvVpQp<mask>#dL#KvYd", "M#E#K#"),
        "pytorch_model.bin",
    ),
    "ProTrek-foldseek": Wild(
        without(ESM2, mask_token_id=24, vocab_size=25), STRUCTURE_LETTERS, {}, ("dvvlpc<mask>vqdp", "ddd")
    ),
    "facebook/esm-1b": Wild(
        {
            **without(ESM1B, "mask_token_id", "token_dropout", "emb_layer_norm_before"),
            "architectures": ["ESMForMaskedLM"],
            "encoder_keep_prob": 0.88,
            "gradient_checkpointing": False,
            "type_vocab_size": 2,
        },
        weights="pytorch_model.bin",
        state=with_position_ids,
    ),
    "hf-internal-testing/tiny-random-EsmForMaskedLM": Wild(
        {
            **ESM2,
            "attention_probs_dropout_prob": 0.1,
            "hidden_dropout_prob": 0.1,
            "emb_layer_norm_before": None,
            "layer_norm_eps": 1e-12,
            "mask_token_id": None,
            "max_position_embeddings": 512,
            "position_embedding_type": "absolute",
            "token_dropout": False,
            "type_vocab_size": 16,
        }
    ),
    "Synthyra/ESM2": Wild(
        {**ESM2, "architectures": ["FastEsmForMaskedLM"], "auto_map": FAST_ESM, "model_type": "fast_esm"}
    ),
    "airkingbd/dplm": Wild(
        {**ESM2, "hidden_dropout_prob": 0.1, "tie_word_embeddings": False}, weights="pytorch_model.bin"
    ),
    "facebook/esm1v": Wild(ESM1B | {"emb_layer_norm_before": False}, weights="pytorch_model.bin"),
    "isikz/esm1b": Wild(ESM1B),
    "ChatterjeeLab/PepMLM": Wild(OLDER),
    "NOC-Lab/AbCDR-ESM2": Wild(ESM2, sequences=("QVQLVQSG<mask>EVKK-DIQMTQSPSS", "EVQL-DIQM")),
    "oriel9p/protsent-esm2": Wild({**ESM2, "architectures": ["EsmModel"]}),
}


def write_wild(folder: Path, name: str) -> Any:
    """Write a checkpoint of `WILD`, and return its model in transformers."""
    wild = WILD[name]
    fields = copy.deepcopy(wild.config) | {"model_type": "esm"}
    model = getattr(transformers, f"Esm{wild.task}")(transformers.EsmConfig.from_dict(fields)).eval()
    model.set_attn_implementation("eager")
    randomize(model, seed=len(name))
    (folder / "config.json").write_text(wild.config_text(wild.config))
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.decoder.weight", None)
    state = wild.state(state)
    if wild.weights.endswith(".bin"):
        torch.save(state, folder / wild.weights)
    else:
        save_file({key: x.contiguous() for key, x in state.items()}, folder / wild.weights, {"format": "pt"})
    (folder / "vocab.txt").write_text("\n".join(wild.vocabulary))
    special = {"tokenizer_class": "EsmTokenizer", **wild.tokenizer}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return model


def wild_peers(folder: Path, name: str, cls: Any = MLXEsmForMaskedLM) -> Peers:
    """Return a checkpoint of `WILD` in MLX, in transformers, and its float64 copy."""
    model = write_wild(folder, name)
    return Peers(cls.from_pretrained(folder), model, copy.deepcopy(model).double())
