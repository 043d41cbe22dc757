"""Redesign the loop before the helix of human ubiquitin: three samples, all other residues fixed."""

import sys

from mlx_esm_hf import generate

checkpoint = sys.argv[1] if len(sys.argv) > 1 else "facebook/esm2_t6_8M_UR50D"
ubiquitin = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"

for design in generate([("ubiquitin", ubiquitin)], checkpoint, fixed="1-16,23-76", samples=3, temperature=0.7):
    print(f"{design.sequence[16:22]}  mean log p {design.log_probability:.2f}")
