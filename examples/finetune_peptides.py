"""Antimicrobial peptides or not: a fine-tuned model beside logistic regression on the composition, over five seeds.

    apt install mmseqs2
    pip install --no-deps modlamp==4.3.3
    python examples/finetune_peptides.py results --model demo

The 5,200 peptides are the set AMPvsUniProt of modlAMP (Müller et al. 2017, doi:10.1093/bioinformatics/btx285), whose
package holds it as a table. Each seed has a split of its own, by clusters of 40% identity: no peptide is tested that
resembles one of the training. What has to be chosen is chosen on validation peptides, again of other clusters.
"""

import argparse
import csv
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import matthews_corrcoef, roc_auc_score
from sklearn.model_selection import GroupShuffleSplit

from mlx_esm_hf import pipeline
from mlx_esm_hf.training.finetune import finetune

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


def read_peptides() -> tuple[np.ndarray, np.ndarray]:
    """Sequences and labels, 1 for an antimicrobial peptide: [peptides] each, without what stands twice."""
    package = find_spec("modlamp")
    if package is None:
        raise SystemExit("The peptides come with modlAMP: pip install --no-deps modlamp==4.3.3")
    with open(Path(package.submodule_search_locations[0], "data", "AMPvsUniProt.csv"), newline="") as file:
        rows = list(csv.reader(file))[1:]
    labels = {sequence.strip(): int(label) for sequence, label in rows if set(sequence.strip()) <= set(RESIDUES)}
    return np.array(list(labels)), np.array(list(labels.values()))


def clusters_of(sequences: np.ndarray) -> np.ndarray:
    """The number of each peptide's cluster at 40% identity over 80% of the longer of two: [peptides]."""
    with tempfile.TemporaryDirectory() as folder:
        fasta = "".join(f">{number}\n{sequence}\n" for number, sequence in enumerate(sequences))
        Path(folder, "all.fasta").write_text(fasta)
        options = ["--min-seq-id", "0.4", "-c", "0.8", "-s", "7.5", "-v", "1"]
        subprocess.run(["mmseqs", "easy-cluster", "all.fasta", "out", "tmp", *options], cwd=folder, check=True)
        pairs = [line.split("\t") for line in Path(folder, "out_cluster.tsv").read_text().splitlines()]
    clusters = np.arange(len(sequences))
    for representative, member in pairs:
        clusters[int(member)] = int(representative)
    return clusters


def split(clusters: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which peptides are trained with (70%), validated with (10%) and tested with (20%)."""
    everything = np.arange(len(clusters))
    known, test = next(GroupShuffleSplit(1, test_size=0.2, random_state=seed).split(everything, groups=clusters))
    inner = GroupShuffleSplit(1, test_size=0.125, random_state=seed).split(known, groups=clusters[known])
    training, validation = next(inner)
    return known[training], known[validation], test


def composition(sequences: np.ndarray) -> np.ndarray:
    """The share of each of the 20 residues: [peptides, 20]."""
    return np.array([[sequence.count(residue) / len(sequence) for residue in RESIDUES] for sequence in sequences])


def by_composition(sequences: np.ndarray, labels: np.ndarray, parts: tuple[np.ndarray, ...]) -> np.ndarray:
    """The test peptides' probabilities by logistic regression, as strict as suits the validation peptides."""
    training, validation, test = parts
    x = composition(sequences)
    fits = [
        LogisticRegression(C=c, max_iter=10_000).fit(x[training], labels[training]) for c in 10.0 ** np.arange(-1, 6)
    ]
    best = max(fits, key=lambda fit: roc_auc_score(labels[validation], fit.predict_proba(x[validation])[:, 1]))
    return best.predict_proba(x[test])[:, 1]


def by_model(
    sequences: np.ndarray,
    labels: np.ndarray,
    parts: tuple[np.ndarray, ...],
    folder: Path,
    seed: int,
    args: argparse.Namespace,
) -> np.ndarray:
    """The test peptides' probabilities by a model that is fitted to the training peptides."""
    training, validation, test = parts
    tables = {}
    folder.mkdir(parents=True)
    for name, part in (("training", training), ("validation", validation)):
        tables[name] = folder / f"{name}.csv"
        with open(tables[name], "w", newline="") as file:
            csv.writer(file).writerows([("sequence", "label"), *zip(sequences[part], labels[part], strict=True)])
    output = folder / "model"
    finetune(
        tables["training"],
        output,
        args.model,
        validation=tables["validation"],
        train=args.train,
        merge=True,
        metrics=["roc_auc", "mcc"],
        num_train_epochs=args.epochs,
        per_device_train_batch_size=32,
        learning_rate=args.learning_rate,
        warmup_steps=0.1,
        weight_decay=0.01,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="roc_auc",
        seed=seed,
    )
    classify = pipeline("text-classification", model=str(output), top_k=None, batch_size=32)
    scores = [{one["label"]: one["score"] for one in result} for result in classify(sequences[test].tolist())]
    return np.array([score["1"] for score in scores])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a folder for the models, which is not there yet")
    parser.add_argument("--model", default="facebook/esm2_t6_8M_UR50D", help="what is fine-tuned, as from_pretrained")
    parser.add_argument("--train", default="full", choices=["full", "lora", "dora", "head"])
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()

    sequences, labels = read_peptides()
    clusters = clusters_of(sequences)
    print(f"{len(sequences)} peptides, {labels.sum()} of them antimicrobial, {len(set(clusters))} clusters")
    found: dict[str, list[tuple[float, float]]] = {"composition": [], "model": []}
    for seed in range(args.seeds):
        parts = split(clusters, seed)
        truth = labels[parts[2]]
        for name, scores in (
            ("composition", by_composition(sequences, labels, parts)),
            ("model", by_model(sequences, labels, parts, args.output / f"seed-{seed}", seed, args)),
        ):
            found[name].append((roc_auc_score(truth, scores), matthews_corrcoef(truth, scores > 0.5)))
            print(f"seed {seed}, {name}: AUROC {found[name][-1][0]:.3f}, MCC {found[name][-1][1]:.3f}", flush=True)
    for name, figures in found.items():
        mean, spread = np.mean(figures, axis=0), np.std(figures, axis=0, ddof=1)
        print(f"{name}: AUROC {mean[0]:.3f} ± {spread[0]:.3f}, MCC {mean[1]:.3f} ± {spread[1]:.3f}")


if __name__ == "__main__":
    main()
