"""Sequences in, answers out: the jobs that people run ESM for, as functions; `mlx-esm` has a command for each."""

from mlx_esm_hf.data.proteins import read_proteins
from mlx_esm_hf.pipelines.contacts import contacts
from mlx_esm_hf.pipelines.convert import convert
from mlx_esm_hf.pipelines.embed import embed
from mlx_esm_hf.pipelines.fill_mask import fill_mask
from mlx_esm_hf.pipelines.fold import fold
from mlx_esm_hf.pipelines.generate import generate
from mlx_esm_hf.pipelines.huggingface import pipeline
from mlx_esm_hf.pipelines.perplexity import perplexity
from mlx_esm_hf.pipelines.protein_model import load
from mlx_esm_hf.pipelines.score import score

__all__ = [
    "contacts",
    "convert",
    "embed",
    "fill_mask",
    "fold",
    "generate",
    "load",
    "perplexity",
    "pipeline",
    "read_proteins",
    "score",
]
