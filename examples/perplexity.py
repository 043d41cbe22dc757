"""Is a sequence natural? Pseudo-perplexity of ubiquitin and of its shuffled residues."""

import random
import sys

from mlx_esm_hf import perplexity

checkpoint = sys.argv[1] if len(sys.argv) > 1 else "facebook/esm2_t6_8M_UR50D"
ubiquitin = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
shuffled = "".join(random.Random(0).sample(ubiquitin, len(ubiquitin)))

for result in perplexity([("ubiquitin", ubiquitin), ("shuffled", shuffled)], checkpoint):
    print(f"{result.id:10} {result.arrays['pseudo_perplexity'][0]:6.2f}")
