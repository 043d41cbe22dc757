"""Examples run, and each port prints the same as its original for transformers."""

import contextlib
import io
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import EsmConfig, EsmForProteinFolding

from mlx_esm_hf import MLXEsmForProteinFolding, convert
from mlx_esm_hf.models.esm.tokenization_esm import EsmTokenizer
from tests.models.esmfold.folding import perturb
from tests.models.esmfold2.oracle import peers
from tests.tiny import tiny, tiny_folding
from tests.vocabulary import write_vocabulary

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script, *arguments):
    """Run a script in this process and return its output. A new process would take seconds to import torch."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return printed.getvalue()


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory):
    """Make random models whose probabilities differ enough to be printed identically by both libraries."""

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
def test_a_port_prints_the_same_as_its_original(example, architecture, lines, tiny_checkpoint):
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
def test_scripts_of_jobs_run(example, lines, tiny_checkpoint):
    assert len(run(f"{example}.py", tiny_checkpoint("EsmForMaskedLM")).splitlines()) == lines


NO_STRUCTURE = {"cells": [{"source": []}, {"outputs": [{"data": {"text/plain": ["7"]}}]}]}


def notebook(pdb):
    """Return a notebook with the output of a structure viewer: a script in HTML, divided into lines."""
    shown = 'viewer.addModel("PARENT N/A\\n{}","pdb");\nviewer.render();'.format(pdb.replace("\n", "\\n"))
    cell = {"outputs": [{"data": {"text/html": shown.splitlines(keepends=True)}}]}
    return json.dumps({"cells": [*NO_STRUCTURE["cells"], cell]})


def test_check_of_esmfold(tmp_path):
    """The check passes for the same model, and fails for another atom, a mirrored structure or another pLDDT."""
    model = perturb(EsmForProteinFolding(EsmConfig(**tiny_folding())).eval())
    model.save_pretrained(tmp_path)
    ours = MLXEsmForProteinFolding.from_pretrained(tmp_path)
    script = (EXAMPLES / "check_esmfold.py").read_text()
    golden = "[2.5828, 0.7993, -10.9334]"
    assert golden in script
    residues = runpy.run_path(str(EXAMPLES / "check_esmfold.py"))["RESIDUES"]
    atom = ours([residues]).positions[0, 0, 0, 0].tolist()
    (tmp_path / "same.py").write_text(script.replace(golden, str(atom)))
    pdb = ours.infer_pdb("MKTAYIAKQRW")
    with_b_of_1 = "".join(
        f"{line[:60]}{float(line[60:66]) / 100:6.2f}{line[66:]}" if line.startswith("ATOM") else line
        for line in pdb.splitlines(keepends=True)
    )
    mirrored = re.sub(r"(ATOM.{26})(.{8})(.{8})", r"\1\3\2", with_b_of_1)  # swaps x and y
    for name, text in (("same", notebook(with_b_of_1)), ("mirror", notebook(mirrored)), ("sure", notebook(pdb))):
        (tmp_path / f"{name}.ipynb").write_text(text)

    def verdicts(script, name):
        with pytest.raises(SystemExit) as done:
            run(script, tmp_path, tmp_path / f"{name}.ipynb")
        return done.value.code

    assert verdicts(tmp_path / "same.py", "same") == 0
    assert verdicts(EXAMPLES / "check_esmfold.py", "same") == 1
    assert verdicts(tmp_path / "same.py", "mirror") == 1
    assert verdicts(tmp_path / "same.py", "sure") == 1
    (tmp_path / "none.ipynb").write_text(json.dumps(NO_STRUCTURE))
    assert verdicts(tmp_path / "same.py", "none") == "error: no structure found in the notebook."


def test_check_of_esmfold2(tmp_path):
    """The check passes with what transformers returns after the same seed, and fails for the published numbers."""
    theirs = peers(tmp_path / "exact").theirs
    constants = runpy.run_path(str(EXAMPLES / "check_esmfold2.py"))
    torch.manual_seed(constants["SEED"])
    expected = theirs.infer_protein(
        constants["UBIQUITIN"],
        num_loops=constants["LOOPS"],
        num_diffusion_samples=constants["SAMPLES"],
        num_sampling_steps=constants["STEPS"],
    )
    stem = sum(p.numel() for p in theirs.esmc.parameters())
    numbers = {
        "DISTOGRAM": expected.distogram_logits[0, 0, 1, :8].tolist(),
        "PTM": expected.ptm.max().item(),
        "LANGUAGE_MODEL": stem,
        "FOLDING": {sum(p.numel() for p in theirs.parameters()) - stem: "tiny"},
    }
    script = (EXAMPLES / "check_esmfold2.py").read_text()
    for name, value in numbers.items():
        script, count = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value}", script)
        assert count == 1
    (tmp_path / "same.py").write_text(script)
    convert(tmp_path / "exact", tmp_path / "half", dtype="bfloat16")

    def verdict(script, *arguments):
        with pytest.raises(SystemExit) as done:
            run(script, *arguments)
        return done.value.code

    assert verdict(tmp_path / "same.py", tmp_path / "exact") == 0
    assert verdict(EXAMPLES / "check_esmfold2.py", tmp_path / "exact") == 1
    assert verdict(tmp_path / "same.py", tmp_path / "half") == 1
    assert verdict(tmp_path / "same.py", tmp_path / "exact", tmp_path / "exact") == 0  # "quantized" exactly


def test_similar_peptides_are_in_the_same_set():
    example = runpy.run_path(str(EXAMPLES / "finetune_peptides.py"))
    rng = np.random.default_rng(0)
    clusters, pairs = rng.integers(200, size=1000), rng.integers(1000, size=(50, 2))
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
    """Run one seed of full fine-tuning. Downloads the data with pip and needs mmseqs2."""
    rows = [line.split() for line in run("finetune_peptides.py", "--seeds", "0", "--train", "full").splitlines()]
    auroc = {row[0]: float(row[1]) for row in rows[-2:]}
    assert auroc["full"] > auroc["composition"] > 0.5
