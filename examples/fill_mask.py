"""Which residue belongs at a masked position of human ubiquitin?"""

import sys

from mlx_esm_hf import pipeline

checkpoint = sys.argv[1] if len(sys.argv) > 1 else "facebook/esm2_t6_8M_UR50D"

unmasker = pipeline("fill-mask", model=checkpoint)
for proposal in unmasker("MQIFVKTLTGKTITLEVEPSDTIENV<mask>AKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"):
    print(f"{proposal['token_str']}  {proposal['score']:.4f}")
