"""Which mutations of human ubiquitin does the model predict to be harmful? Zero-shot, with masked marginals."""

import sys

from mlx_esm_hf import score

checkpoint = sys.argv[1] if len(sys.argv) > 1 else "facebook/esm2_t6_8M_UR50D"
ubiquitin = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"

scores = score(["L8A", "K48R", "I44A", "G76A", "I44A:K48R"], ubiquitin, checkpoint)
for row in sorted(scores.rows, key=lambda row: row[checkpoint]):
    print(f"{row['mutant']:10} {row[checkpoint]:7.3f}")
