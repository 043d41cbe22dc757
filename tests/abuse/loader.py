"""Load several checkpoints in one process.

    python -m tests.abuse.loader FOLDER ...

Prints a JSON line for each: {"argument", "outcome", "error", "logits", "log_probabilities", "warnings"}. The logits are
the model's for token ids, the log-probabilities those of the jobs' model for residues. The outcome is "loaded",
"refused" (by an error meant for the user) or "bug" (by any other error).
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
        return {**outcome(folder), "warnings": [str(warning.message) for warning in caught]}


def outcome(folder):
    try:
        logits = MLXAutoModelForMaskedLM.from_pretrained(folder)(IDS, return_dict=True).logits
        model = load_protein_model(MLXAutoModelForMaskedLM, folder)
        (rows,) = model.blended_log_probabilities([model.vocabulary.encode(SEQUENCE)])
        return {"outcome": "loaded", "logits": logits.tolist(), "log_probabilities": rows.tolist()}
    except MEANT_FOR_USERS as error:
        return {"outcome": "refused", "error": f"{type(error).__name__}: {error}"}
    except Exception:
        return {"outcome": "bug", "error": traceback.format_exc()}


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        print(json.dumps({"argument": folder, **attempt(folder)}), flush=True)
