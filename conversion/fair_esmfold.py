"""Convert ESMFold of fair-esm, with its language model, to a Hugging Face folder.

    python -m conversion.fair_esmfold esmfold_3B_v1.pt esm2_t36_3B_UR50D.pt esmfold_v1

fair-esm keeps the folding part and the language model in two files; esmfold_3B_v0.pt has the same layout. The settings
come from the first file. No code from either is run, and neither torch, fair-esm nor omegaconf is needed. The language
model is converted to float16, as fair-esm does when folding. All weights are in memory only once.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub.errors import StrictDataclassError
from mlx.utils import tree_flatten
from transformers.models.esm.configuration_esm import (
    EsmFoldConfig,
    StructureModuleConfig,
    TrunkConfig,
    get_default_vocab_list,
)

from conversion import fair_esm
from mlx_esm_hf import EsmTokenizer, MLXEsmConfig, MLXEsmForProteinFolding
from mlx_esm_hf.checkpoint.torch_bin import load_torch_checkpoint, omegaconf_values
from mlx_esm_hf.checkpoint.write import stale_weights
from mlx_esm_hf.errors import CheckpointError
from mlx_esm_hf.models.esmfold.residue_constants import RESTYPES_WITH_X
from mlx_esm_hf.runtime.files import replace_files

# Settings of the structure module: {name in fair-esm: name in transformers}.
RENAMES = {
    "c_s": "sequence_dim",
    "c_z": "pairwise_dim",
    "c_ipa": "ipa_dim",
    "c_resnet": "resnet_dim",
    "no_heads_ipa": "num_heads_ipa",
    "no_qk_points": "num_qk_points",
    "no_v_points": "num_v_points",
    "no_blocks": "num_blocks",
    "no_transition_layers": "num_transition_layers",
    "no_resnet_blocks": "num_resnet_blocks",
    "no_angles": "num_angles",
}

# Vocabulary of facebook/esmfold_v1. Its padding token is alanine, residue 0.
VOCABULARY = (*RESTYPES_WITH_X, "<pad>", "<mask>", "<cls>", "<sep>", "<eos>")


def convert(folding: Path, language_model: Path, output: Path) -> MLXEsmForProteinFolding:
    """Write `config.json`, `model.safetensors` and the tokenizer files into the folder `output`, and return the model.

    Args:
        folding: `esmfold_3B_v1.pt`. If it contains weights of the language model, they override those of the other
            file, as in fair-esm.
        language_model: `esm2_t36_3B_UR50D.pt`. Without its regression file in the same folder the model has no contact
            head, which folding does not need.
        output: the folder to write.

    Raises:
        CheckpointError: a file is damaged or malicious, is not a complete checkpoint, or the two do not fit together.
        OSError: a file cannot be read or written.
    """
    state, settings = load_torch_checkpoint(folding)
    # OpenFold 2 wraps the two projections to points in a module.
    state = {key.replace("_points.linear.", "_points."): array for key, array in state.items()}
    in_folding = {key: state.pop(key) for key in list(state) if key.startswith("esm.")}
    stem = fair_esm.read(language_model).half()
    for _, array in tree_flatten(stem.parameters()):
        mx.eval(array)  # one by one, so that each float32 array is freed before the next one is cast
    try:
        model = MLXEsmForProteinFolding(make_config(settings, state, stem.config))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, StrictDataclassError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise CheckpointError(f"{folding} is not a checkpoint of ESMFold: {reason}.") from error
    if stem.esm.contact_head is None:
        model.esm.contact_head = None
    try:
        stem.esm.load_state_dict(in_folding, strict=False)
        model.load_state_dict(state | {f"esm.{name}": x for name, x in tree_flatten(stem.esm.parameters())})
    except RuntimeError as error:
        raise CheckpointError(f"{folding}, with the language model {language_model}: {error}") from error
    with replace_files(output, stale_weights()) as folder:
        write_tokenizer(folder)
        model.save_pretrained(folder)
    return model


def make_config(settings: dict[str, Any], state: dict[str, mx.array], stem: MLXEsmConfig) -> MLXEsmConfig:
    """Return the config of the folding model.

    Args:
        settings: everything in the checkpoint except the weights.
        state: the weights of the folding part.
        stem: the config of the language model.

    Raises:
        KeyError: a setting is missing.
        TypeError, ValueError, StrictDataclassError: a setting is invalid, or does not fit the weights.
    """
    settings = omegaconf_values(settings["cfg"]["model"])
    trunk = settings["trunk"]
    structure = {RENAMES.get(name, name): value for name, value in trunk["structure_module"].items()}
    trunk = {"chunk_size": None} | known(trunk, TrunkConfig)
    trunk["structure_module"] = known(structure, StructureModuleConfig)
    fold = known(settings, EsmFoldConfig) | {"fp16_esm": True, "trunk": trunk}
    fields = {"is_folding_model": True, "vocab_list": list(get_default_vocab_list()), "esmfold_config": fold}
    config = MLXEsmConfig.from_dict(stem.to_dict() | fields)
    # Checked before building a model, which could be of any size. Loading the weights checks their shapes.
    built = config.esmfold_config.trunk
    for modules, number in (
        ("trunk.blocks.", built.num_blocks),
        ("trunk.structure_module.transition.layers.", built.structure_module.num_transition_layers),
        ("trunk.structure_module.angle_resnet.layers.", built.structure_module.num_resnet_blocks),
    ):
        found = len({key.removeprefix(modules).split(".")[0] for key in state if key.startswith(modules)})
        if number != found:
            raise ValueError(f"its settings have {number} {modules}*, but its weights have {found}")
    return config


def known(settings: dict[str, Any], config: type) -> dict[str, Any]:
    """Return the settings that a config of transformers has. Others, such as `_name`, do not describe the model."""
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in settings.items() if name in names}


def write_tokenizer(output: Path) -> None:
    """Write the tokenizer of ESMFold into a folder."""
    vocabulary = output / "vocab.txt"
    vocabulary.write_text("\n".join(VOCABULARY), encoding="utf-8")
    EsmTokenizer(vocabulary, pad_token=VOCABULARY[0]).save_pretrained(output)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Convert ESMFold of fair-esm to a Hugging Face folder.")
    parser.add_argument("folding", type=Path, help="esmfold_3B_v1.pt")
    parser.add_argument("language_model", type=Path, help="esm2_t36_3B_UR50D.pt")
    parser.add_argument("output", type=Path, help="the folder to write")
    options = parser.parse_args()
    try:
        model = convert(options.folding, options.language_model, options.output)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.output}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
