"""Checkpoints of other projects by the `model_type` of their config: those that are ESM, and those that are not.

A refusal needs the config alone, so that no weights are downloaded for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_esm_hf.demo import shown_name
from mlx_esm_hf.errors import UserError

# {model_type: the model_type of the same network with the same parameter names}
ALIASES = {"fast_esm": "esm"}

REMOTE_CODE = "Use transformers with trust_remote_code=True, which runs the repository's own code on torch"

# {model_type in lower case: what the network is, and what to do}
OTHERS = {
    "esmplusplus": "is ESMC with other parameter names. Use the original weights, such as biohub/ESMC-300M.",
    "nv_esm": "is ESM-2 in the layers of NVIDIA's TransformerEngine, which have other parameter names. Use Meta's "
    "original with the same name, such as facebook/esm2_t33_650M_UR50D, or export a fine-tuned one to transformers' "
    "EsmForMaskedLM with NVIDIA's BioNeMo recipe.",
    "esmc_sae": "has sparse autoencoders for the hidden states of an ESMC, and no language model. Load the ESMC here, "
    "such as biohub/ESMC-600M, and the autoencoders with the esm package.",
    "amplify": f"is AMPLIFY, a network with another feed-forward and other norms. {REMOTE_CODE}.",
    "esm3": "is ESM3, a network with tracks for structure and function. Use the esm package.",
}
NUCLEOTIDE_TRANSFORMER_2 = (
    "is another network than ESM: a Nucleotide Transformer v2, with a gated feed-forward (config field "
    f"`add_bias_fnn`). {REMOTE_CODE}, or a Nucleotide Transformer v1 here, such as "
    "InstaDeepAI/nucleotide-transformer-500m-human-ref."
)
ESM_PACKAGE = (
    "has the config of the esm package (fields d_model, n_heads and n_layers), which transformers cannot load either. "
    "Use a later revision of the repository, whose config has a model_type, or convert the weights with "
    "conversion/esmc.py of this library."
)


def model_type_of(fields: Mapping[str, Any], source: str, default: Any = None) -> Any:
    """Return the `model_type` that a config stands for here.

    Args:
        fields: the fields of its `config.json`.
        source: Hub id or folder, for messages.
        default: the result if the config has no `model_type`; None refuses such a config.

    Raises:
        UserError: the network is another one, or the config does not say which one.
    """
    model_type, code = fields.get("model_type"), fields.get("auto_map")
    name = shown_name(source) if source else "This model"
    if "add_bias_fnn" in fields:
        raise UserError(f"{name} {NUCLEOTIDE_TRANSFORMER_2}")
    if isinstance(model_type, str) and model_type.lower() in OTHERS:
        raise UserError(f"{name} (model_type {model_type!r}) {OTHERS[model_type.lower()]}")
    if model_type is None and {"d_model", "n_heads", "n_layers"} <= fields.keys():
        raise UserError(f"{name} {ESM_PACKAGE}")
    if model_type is None and code:
        raise UserError(
            f"{name} has a config.json without model_type, and code of its own (auto_map), so its network is unknown. "
            f"{REMOTE_CODE}."
        )
    if model_type is None and default is None:
        raise UserError(
            f"The config.json of {name} has no model_type. Load it with the class of its family, such as MLXEsmModel "
            'for ESM-1b and ESM-2, or add "model_type": "esm".'
        )
    if model_type is None:
        return default
    return ALIASES.get(model_type, model_type) if isinstance(model_type, str) else model_type
