"""How many bits does a checkpoint need? Print its size and its similarity to the original for 8 to 2 bits."""

import sys
import tempfile

from mlx_esm_hf import convert

checkpoint = sys.argv[1] if len(sys.argv) > 1 else "facebook/esm2_t6_8M_UR50D"
ubiquitin = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"

with tempfile.TemporaryDirectory() as folder:
    for bits in (8, 6, 4, 3, 2):
        conversion = convert(checkpoint, f"{folder}/{bits}", quantize=True, bits=bits, report=[ubiquitin])
        rows = {what: after for what, before, after in conversion.rows}
        cosine = rows["mean cosine of residue embeddings"]
        print(f"{bits} bits: {rows['size on disk']}, mean cosine of residue embeddings {cosine}")
