"""Compare ESMFold2 with published numbers of its weights.

    python examples/check_esmfold2.py [CHECKPOINT] [QUANTIZED]

The script exits with code 1 if one of these is out of tolerance:

- the parameters of the folding part and of the language model, as published for ESMFold2 or ESMFold2-Fast;
- ubiquitin as in transformers' slow test of ESMFold2 (tests/models/esmfold2/test_modeling_esmfold2.py): distogram
  logits of one pair and the higher pTM of two samples, with the random numbers of torch, which must be installed;
- with a checkpoint whose language model is quantized: pTM, pLDDT and the CA atoms of the same protein next to those of
  the first one.

The expected numbers are those of the full ESMFold2. The checkpoint is a download of 26 GB, or a folder.
"""

import sys

import mlx.core as mx
import numpy as np
import torch
from Bio.SVDSuperimposer import SVDSuperimposer

from mlx_esm_hf import MLXEsmFold2Model
from mlx_esm_hf.models.esmfold2.sampler import Draws

UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
SEED, LOOPS, SAMPLES, STEPS = 0, 4, 2, 32
DISTOGRAM = [6.5849, 7.9825, 9.6068, 9.6403, 16.5200, 18.9912, 19.9698, 23.0489]  # logits of residues 1 and 2
PTM = 0.7427
LANGUAGE_MODEL = 6_345_280_000
FOLDING = {188_471_325: "ESMFold2-Fast", 234_622_749: "ESMFold2"}
LOGIT_BAR = 1e-3 if mx.default_device() == mx.cpu else 0.2
PTM_BAR, QUANTIZED_PTM_BAR, PLDDT_BAR, RMSD_BAR = 0.01, 0.03, 0.03, 1.0  # the last in Å


class TorchDraws(Draws):
    """The random numbers that transformers draws from torch's stream for one protein."""

    def __init__(self, tokens: int, atoms: int):
        torch.manual_seed(SEED)
        self.tokens, self.atoms, self.padded = tokens, atoms, atoms + -atoms % 32

    def state(self, width: int, std: float) -> mx.array:
        """Return the initial pair states."""
        empty = torch.empty(1, self.tokens, self.tokens, width)
        return mx.array(torch.nn.init.trunc_normal_(empty, 0.0, std, -3 * std, 3 * std).numpy())

    def keep(self, loop: int, width: int, p: float) -> mx.array:
        """Return the elements that dropout keeps."""
        ones = torch.ones(1, self.tokens, self.tokens, width)
        return mx.array(torch.nn.functional.dropout(ones, p, training=True).numpy() > 0)

    def start(self, row: int, samples: range) -> mx.array:
        """Return normal numbers for the first positions."""
        return mx.array(torch.randn(len(samples), self.padded, 3).numpy()[:, : self.atoms])

    def rotations(self, row: int, samples: range, step: int) -> mx.array:
        """Return quaternions."""
        return mx.array(torch.randn(len(samples), 4).numpy())

    def translations(self, row: int, samples: range, step: int) -> mx.array:
        """Return translations."""
        return mx.array(torch.randn(len(samples), 1, 3).numpy())

    def noise(self, row: int, samples: range, step: int) -> mx.array:
        """Return the noise of a step."""
        return self.start(row, samples)


def report(name: str, found: float, bar: float, unit: str = "") -> bool:
    """Print a deviation and return whether it is within the tolerance."""
    within = found <= bar  # False for NaN
    print(f"{name}: {found:.2g} {unit}".rstrip() + f", {'within' if within else 'OUTSIDE'} {bar:g}")
    return bool(within)


def fold(model: MLXEsmFold2Model) -> dict:
    """Fold ubiquitin with torch's random numbers."""
    features = model.features(UBIQUITIN)
    draws = TorchDraws(len(UBIQUITIN), int(features["atom_attention_mask"].sum()))
    options = {"num_diffusion_samples": SAMPLES, "num_sampling_steps": STEPS, "num_loops": LOOPS, "draws": draws}
    output = model.fold(**features, **options)
    alpha = np.flatnonzero((np.array(features["ref_atom_name_chars"])[0] == [35, 33, 0, 0]).all(axis=1))
    return {
        "logits": np.array(output.distogram_logits.astype(mx.float32))[0, 0, 1, : len(DISTOGRAM)],
        "ptm": float(output.ptm.max()),
        "plddt": float(output.complex_plddt.max()),
        "alpha": np.array(output.sample_atom_coords)[int(output.ptm.argmax()), alpha],
    }


def main() -> None:
    """Run the checks and print the results."""
    model = MLXEsmFold2Model.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "biohub/ESMFold2", dtype="float32")
    stem = model.esmc.num_parameters()
    folding = model.num_parameters() - stem
    print(f"{stem:,} parameters of the language model, {folding:,} of the folding part")
    passed = [report("parameters of the language model, difference", abs(stem - LANGUAGE_MODEL), 0)]
    passed.append(report("parameters of the folding part, difference", min(abs(folding - n) for n in FOLDING), 0))
    found = fold(model)
    passed.append(report("transformers' test, distogram", np.abs(found["logits"] - DISTOGRAM).max(), LOGIT_BAR))
    passed.append(report("transformers' test, pTM", abs(found["ptm"] - PTM), PTM_BAR))
    if len(sys.argv) > 2:
        del model
        other = fold(MLXEsmFold2Model.from_pretrained(sys.argv[2]))
        passed.append(report("quantized, pTM", abs(other["ptm"] - found["ptm"]), QUANTIZED_PTM_BAR))
        passed.append(report("quantized, pLDDT", abs(other["plddt"] - found["plddt"]), PLDDT_BAR))
        superposition = SVDSuperimposer()
        superposition.set(found["alpha"], other["alpha"])
        superposition.run()
        passed.append(report("quantized, CA-RMSD", superposition.get_rms(), RMSD_BAR, "Å"))
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
