"""Which of a hundred proteins are most similar to the first one? Nearest neighbors by cosine of the embeddings."""

import sys
from pathlib import Path

import numpy as np

from mlx_esm_hf import embed

checkpoint = sys.argv[1] if len(sys.argv) > 1 else "facebook/esm2_t6_8M_UR50D"
fasta = Path(__file__).with_name("proteins.fasta")

results = list(embed(fasta, checkpoint))
vectors = np.stack([result.arrays["mean"] for result in results])
vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

similarity = vectors @ vectors[0]
for i in np.argsort(-similarity)[:5]:
    print(f"{similarity[i]:.3f}  {results[i].id}")
