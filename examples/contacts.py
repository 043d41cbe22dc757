"""Which residues of human ubiquitin touch? The ten most probable contacts."""

import sys

from mlx_esm_hf import contacts
from mlx_esm_hf.jobs.contacts import top_contacts

checkpoint = sys.argv[1] if len(sys.argv) > 1 else "facebook/esm2_t6_8M_UR50D"
ubiquitin = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"

(result,) = contacts([ubiquitin], checkpoint)
for i, j, probability in top_contacts(result.arrays["contacts"], 10):
    print(f"{ubiquitin[i - 1]}{i:<3} {ubiquitin[j - 1]}{j:<3} {probability:.3f}")
