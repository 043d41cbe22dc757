"""ESM-1, ESM-1b, ESM-1v and ESM-2."""

import mlx_esm_hf.models.esm.tokenization_esm  # noqa: F401  registers ESM-1's tokenizer with transformers' AutoTokenizer
