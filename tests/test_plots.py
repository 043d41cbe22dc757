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


@pytest.mark.parametrize("length", [1, 2, 12])
def test_chains_are_named_and_ticks_are_whole_numbers(length):
    names = list("ABCD")[:length]
    ends = [length * k / len(names) + 0.5 for k in range(1, len(names))]
    for figure in (
        plots.plddt_curve(np.full(length, 80.0), ends, "title", chain_names=names),
        plots.aligned_error(np.ones((length, length)), 31.75, ends, "title", chain_names=names),
        plots.loss_curves([{"step": step + 1, "loss": 1.0} for step in range(length)]),
        plots.contact_map(np.ones((length, length))),
    ):
        plots.png(figure)
        axes = figure.axes[0]
        texts = [text.get_text() for text in axes.texts]
        if figure.axes[0].get_xlabel() in ("residue", "scored residue") and len(names) > 1 and texts:
            assert [text for text in texts if text in names][: len(names)] == names or "A" in texts
        ticks = [tick for tick in axes.get_xticks() if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
        assert ticks and all(tick == round(tick) for tick in ticks)


def test_plddt_has_alphafolds_bands_and_shows_single_residues():
    figure = plots.plddt_curve(np.array([80.0, np.nan, 60.0, 70.0]), [2.5])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["very low", "low", "confident", "very high"]
    assert axes.lines[-2].get_xdata().tolist() == [1]  # before the line between the chains


@pytest.mark.parametrize("length", [1, 2, 3000])
def test_pictures_of_any_length(length):
    """A scan of a long protein fits into a PNG, and NaN does not hide the other scores."""
    scores = np.full((20, length), np.nan)
    plots.png(plots.mutation_scan(scores, "M" * length, RESIDUES))
    scores[0] = 2.0
    figure = plots.mutation_scan(scores, "M" * length, RESIDUES)
    assert figure.axes[0].images[0].get_clim() == (-2, 2) and figure.get_size_inches()[0] <= 24
    plots.backbone(RNG.normal(size=(min(length, 20), 3)), np.arange(min(length, 20)), "x")


def test_wild_type_cells_are_marked():
    figure = plots.mutation_scan(np.ones((20, 3)), "CXA", RESIDUES)
    assert figure.axes[0].collections[0].get_offsets().tolist() == [[0, 1], [2, 0]]


def test_information_is_that_of_uniform_and_certain_positions():
    uniform, certain = np.full(20, 1 / 20), np.eye(20)[3]
    np.testing.assert_allclose(plots.information(np.stack([uniform, certain])), [0, np.log2(20)], atol=1e-12)
