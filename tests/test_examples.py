"""Each example prints what its transformers original prints, from the same checkpoint."""

import contextlib
import io
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import EsmConfig

from mlx_esm_hf.models.esm.tokenization_esm import EsmTokenizer
from tests.tiny import tiny
from tests.vocabulary import write_vocabulary

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script, *arguments):
    """What the script prints; in this process, since a new one takes seconds to import torch."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return printed.getvalue()


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory):
    """A random model with the head that the example wants, and probabilities far enough apart to be printed alike."""

    def make(architecture):
        folder = tmp_path_factory.mktemp(architecture)
        torch.manual_seed(0)
        config = EsmConfig(
            **tiny(initializer_range=0.5),
            num_labels=3,
            id2label={0: "helix", 1: "strand", 2: "coil"},
            label2id={"helix": 0, "strand": 1, "coil": 2},
        )
        getattr(transformers, architecture)(config).save_pretrained(folder)
        EsmTokenizer(write_vocabulary(folder)).save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(
    ("example", "architecture", "lines"),
    [
        ("masked_residues", "EsmForMaskedLM", 5),
        ("sequence_classification", "EsmForSequenceClassification", 2),
        ("token_classification", "EsmForTokenClassification", 46),
    ],
)
def test_port_prints_what_the_original_prints(example, architecture, lines, tiny_checkpoint):
    checkpoint = tiny_checkpoint(architecture)
    ours = run(f"{example}.py", checkpoint)
    theirs = run(f"{example}_transformers.py", checkpoint)
    assert ours == theirs
    assert len(ours.splitlines()) == lines


@pytest.mark.parametrize(
    ("example", "lines"),
    [
        ("embed", 5),
        ("fill_mask", 5),
        ("score", 5),
        ("contacts", 10),
        ("perplexity", 2),
        ("generate", 3),
        ("convert", 5),
    ],
)
def test_one_script_for_each_job(example, lines, tiny_checkpoint):
    assert len(run(f"{example}.py", tiny_checkpoint("EsmForMaskedLM")).splitlines()) == lines


def test_no_peptide_is_similar_to_one_of_another_side():
    example = runpy.run_path(str(EXAMPLES / "finetune_peptides.py"))
    dice = np.random.default_rng(0)
    clusters, pairs = dice.integers(200, size=1000), dice.integers(1000, size=(50, 2))
    peptides = [(f"peptide {i}", str(i % 2)) for i in range(1000)]
    splits = [example["split"](peptides, clusters, pairs, seed) for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]
    for sides in splits:
        side_of = {int(name.split()[1]): number for number, side in enumerate(sides) for name, _ in side}
        assert len(side_of) == sum(map(len, sides)) >= 950
        for cluster in set(clusters):
            assert len({side_of[i] for i in np.flatnonzero(clusters == cluster) if i in side_of}) <= 1
        assert all(side_of[a] == side_of[b] for a, b in pairs if a in side_of and b in side_of)
        np.testing.assert_allclose([len(side) for side in sides], [600, 200, 200], atol=50)


@pytest.mark.long
def test_finetuning_beats_composition():
    """One seed, by the full model: fetches the data with pip, and needs mmseqs."""
    rows = [line.split() for line in run("finetune_peptides.py", "--seeds", "0", "--train", "full").splitlines()]
    auroc = {row[0]: float(row[1]) for row in rows[-2:]}
    assert auroc["full"] > auroc["composition"] > 0.5
