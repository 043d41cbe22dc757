"""The objective that ESM was trained with: some residues are hidden or replaced, and the model says what they were."""

from __future__ import annotations

import numpy as np

from mlx_esm_hf.data.proteins import STANDARD
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.modeling_inputs import IGNORE_INDEX

# Of the residues 15% are selected; of those 80% become <mask>, 10% another residue, and 10% stay (BERT's numbers).
SELECTED, MASKED, REPLACED = 0.15, 0.8, 0.1
RESIDUES = STANDARD + "BUZO"  # X says that nobody knows the residue, so there is nothing to learn from it


def corrupt(ids: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Corrupt residues for a masked language model; gaps, X and special tokens are left alone.

    Args:
        ids: [positions], int32.
        rng: draws which residues are selected, and what becomes of them.

    Returns:
        (input ids, labels), int32 [positions] each; labels are −100 where nothing was selected.

    Source: Rives et al. 2021, Methods; Devlin et al. 2019, section 3.1.
    """
    selected = np.isin(ids, vocabulary.ids_of(RESIDUES)) & (rng.random(len(ids)) < SELECTED)
    fate = rng.random(len(ids))
    others = rng.choice(vocabulary.ids_of(STANDARD), len(ids))
    inputs = np.where(selected & (fate < MASKED), vocabulary.mask, ids)
    inputs = np.where(selected & (fate >= MASKED) & (fate < MASKED + REPLACED), others, inputs)
    return inputs.astype(np.int32), np.where(selected, ids, IGNORE_INDEX).astype(np.int32)
