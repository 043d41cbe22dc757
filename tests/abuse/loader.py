"""Loads checkpoints one after the other, in a process that may die of one: `python -m tests.abuse.loader FOLDER ...`

For each a line of JSON: {"argument", "outcome", "error", "logits", "log_probabilities", "warned"}, the logits of token
ids, and what the jobs' model says of residues. The outcome is "loaded", "refused" (by an error that is meant for a
user) or "bug" (any other).
"""

import json
import sys
import traceback
import warnings

from mlx_esm_hf import MLXAutoModelForMaskedLM, load_protein_model

IDS = [[0, 20, 15, 32, 6, 7, 11, 4, 2]]
SEQUENCE = "ACDEFGHIKLMNPQRSTVWYXBUZO<mask>AL"
MEANT_FOR_USERS = (OSError, ValueError)


def attempt(folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        return {**outcome(folder), "warned": [str(warning.message) for warning in caught]}


def outcome(folder):
    try:
        logits = MLXAutoModelForMaskedLM.from_pretrained(folder)(IDS, return_dict=True).logits
        model = load_protein_model(MLXAutoModelForMaskedLM, folder)
        (rows,) = model.blended_log_probabilities([model.vocabulary.encode(SEQUENCE)])
        return {"outcome": "loaded", "logits": logits.tolist(), "log_probabilities": rows.tolist()}
    except MEANT_FOR_USERS as error:
        return {"outcome": "refused", "error": f"{type(error).__name__}: {error}"}
    except RuntimeError as error:  # documented: parameters of another shape
        if "Shapes differ" in str(error):
            return {"outcome": "refused", "error": f"{type(error).__name__}: {error}"}
        return {"outcome": "bug", "error": traceback.format_exc()}
    except Exception:
        return {"outcome": "bug", "error": traceback.format_exc()}


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        print(json.dumps({"argument": folder, **attempt(folder)}), flush=True)
