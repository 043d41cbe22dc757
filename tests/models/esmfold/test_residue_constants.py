"""Residue tables compared with transformers', which are DeepMind's."""

import numpy as np
import torch
from transformers.models.esm.openfold_utils import make_atom14_masks
from transformers.models.esm.openfold_utils import residue_constants as theirs

from mlx_esm_hf.models.esmfold import residue_constants as ours


def test_names() -> None:
    assert list(ours.RESTYPES_WITH_X) == theirs.restypes_with_x
    assert theirs.atom_types == ours.ATOM37
    assert theirs.resnames == ours.RESIDUE_NAMES


def test_tables() -> None:
    assert np.array_equal(ours.DEFAULT_FRAMES, theirs.restype_rigid_group_default_frame)
    assert np.array_equal(ours.ATOM14_GROUPS, theirs.restype_atom14_to_rigid_group)
    assert np.array_equal(ours.ATOM14_POSITIONS, theirs.restype_atom14_rigid_group_positions)
    assert np.array_equal(ours.ATOM14_MASK, theirs.restype_atom14_mask)
    assert np.array_equal(ours.ATOM37_MASK, theirs.restype_atom37_mask)
    masks = make_atom14_masks({"aatype": torch.arange(21)})
    assert np.array_equal(ours.ATOM14_TO_ATOM37, masks["residx_atom14_to_atom37"])
    assert np.array_equal(ours.ATOM37_TO_ATOM14, masks["residx_atom37_to_atom14"])
