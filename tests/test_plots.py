"""Plots show the arrays that they are given."""

import io

import numpy as np
import pytest
from matplotlib.image import imread

from mlx_esm_hf import plots

LENGTH = 12
RNG = np.random.default_rng(0)
CONTACTS = RNG.uniform(size=(LENGTH, LENGTH))
KNOWN = np.zeros((LENGTH, LENGTH))
KNOWN[1, 9] = KNOWN[9, 1] = 1
KNOWN[0] = KNOWN[:, 0] = np.nan
PROBABILITIES = RNG.dirichlet(np.ones(20), LENGTH)
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.contact_map(CONTACTS),
        lambda: plots.contact_map(CONTACTS, KNOWN, [(2, 10, 0.9), (3, 11, 0.8), (1, 9, 0.7)], "$x: a title"),
        lambda: plots.mutation_scan(RNG.normal(size=(20, LENGTH)), "MKTAYIAKQRXX", RESIDUES, 5),
        lambda: plots.residue_curve(RNG.normal(size=LENGTH), "score", [4.5], marked=np.arange(LENGTH) > 6),
        lambda: plots.plddt_curve(np.array([50, np.nan, 90]), [1.5]),
        lambda: plots.aligned_error(CONTACTS, 31.75, [4.5]),
        lambda: plots.loss_curves([{"step": 1, "loss": 3.0}, {"step": 2, "eval_loss": 2.5}]),
        lambda: plots.embedding_map(RNG.normal(size=(3, 2)), ["a", "b", "a"]),
        lambda: plots.residue_letters(PROBABILITIES, RESIDUES, "MKTAYIAKQRMK"),
        lambda: plots.backbone(RNG.normal(size=(LENGTH, 3)).cumsum(0), np.arange(LENGTH), "x", pairs=[(1, 9, 0.5)]),
    ],
)
def test_a_picture_is_not_empty(draw):
    picture = imread(io.BytesIO(plots.png(draw())))
    assert picture.shape[0] > 300 and picture.std() > 0.01


def test_right_and_wrong_contacts_lie_below_the_diagonal():
    """A pair of which the structure knows nothing is left out."""
    figure = plots.contact_map(CONTACTS, KNOWN, [(2, 10, 0.9), (3, 11, 0.8), (1, 9, 0.7)])
    right, wrong = (marks.get_offsets().tolist() for marks in figure.axes[0].collections)
    assert (right, wrong) == ([[10, 2]], [[11, 3]])


def test_wild_type_cells_are_marked():
    figure = plots.mutation_scan(np.ones((20, 3)), "CXA", RESIDUES)
    assert figure.axes[0].collections[0].get_offsets().tolist() == [[0, 1], [2, 0]]


def test_information_is_that_of_uniform_and_certain_positions():
    uniform, certain = np.full(20, 1 / 20), np.eye(20)[3]
    np.testing.assert_allclose(plots.information(np.stack([uniform, certain])), [0, np.log2(20)], atol=1e-12)
