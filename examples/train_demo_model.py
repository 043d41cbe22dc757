"""Train the model bundled with the package: split proteins by homology, train, evaluate, write a model card.

    apt install mmseqs2
    python examples/train_demo_model.py proteins.fasta.gz demo

Any proteins will do. The bundled model was trained on the 20,000 proteins of UniProt in Debian's package
mmseqs2-examples (`apt download mmseqs2-examples`). All of Swiss-Prot is at https://ftp.uniprot.org, in
uniprot_sprot.fasta.gz.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_esm_hf import MLXEsmForMaskedLM
from mlx_esm_hf.data.batches import make_batches
from mlx_esm_hf.data.proteins import STANDARD, Protein
from mlx_esm_hf.data.source import read_proteins
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.data.windows import Window
from mlx_esm_hf.models.esm.tokenization_esm import esm2_tokenizer
from mlx_esm_hf.training.pretrain import pretrain
from mlx_esm_hf.training.token_store import is_held_out

SHAPE = (6, 160, 5)  # layers, hidden size, heads: 1.9 million parameters, 3.8 MB in float16
CONTEXT, HELD_OUT, MASKED = 256, 0.06, 0.15


def write_fasta(path: Path, proteins: list[Protein]) -> None:
    """Write proteins to a FASTA file."""
    path.write_text("".join(f">{protein.id}\n{protein.sequence}\n" for protein in proteins))


def split_by_homology(proteins: list[Protein], folder: Path) -> tuple[list[Protein], list[Protein]]:
    """Return training and held-out proteins, without homologues between the two that mmseqs2 can find.

    Whole clusters of 30% identity are held out. A held-out protein is dropped if a search (E-value below 0.001) still
    finds a similar training protein.
    """
    numbered = [Protein(str(number), protein.sequence) for number, protein in enumerate(proteins)]
    write_fasta(folder / "all.fasta", numbered)
    cluster = ["mmseqs", "easy-cluster", "all.fasta", "clusters", "tmp", "--min-seq-id", "0.3", "-c", "0.5", "-v", "1"]
    subprocess.run(cluster, cwd=folder, check=True)
    training, held_out = [], []
    for line in (folder / "clusters_cluster.tsv").read_text().splitlines():
        representative, member = line.split("\t")
        side = held_out if is_held_out(representative.encode(), HELD_OUT) else training
        side.append(numbered[int(member)])
    write_fasta(folder / "training.fasta", training)
    write_fasta(folder / "held_out.fasta", held_out)
    search = ["mmseqs", "easy-search", "held_out.fasta", "training.fasta", "hits.tsv", "tmp", "-e", "0.001", "-v", "1"]
    subprocess.run(search, cwd=folder, check=True)
    found = {line.split("\t")[0] for line in (folder / "hits.tsv").read_text().splitlines()}
    return training, [protein for protein in held_out if protein.id not in found]


def masked_places(vocabulary: Vocabulary, sequences: list[np.ndarray]) -> list[np.ndarray]:
    """Return the masked positions of each protein: 15% of its residues, the same at each call."""
    residues, rng = vocabulary.ids_of(STANDARD), np.random.default_rng(0)
    return [np.flatnonzero(np.isin(ids, residues) & (rng.random(len(ids)) < MASKED)) for ids in sequences]


def masked_losses(
    model: MLXEsmForMaskedLM, vocabulary: Vocabulary, sequences: list[np.ndarray], places: list[np.ndarray]
) -> np.ndarray:
    """Return the model's mean loss at the masked positions of each protein in nats, [proteins]; NaN without any."""
    inputs = [ids.copy() for ids in sequences]
    for ids, chosen in zip(inputs, places, strict=True):
        ids[chosen] = vocabulary.mask
    windows = [Window(number, 0, len(ids)) for number, ids in enumerate(inputs)]
    losses = np.full(len(sequences), np.nan)
    for batch in make_batches(inputs, windows, vocabulary, 4096):
        logits = model(batch.input_ids, batch.attention_mask).logits
        rows = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        for window, row in zip(batch.windows, rows, strict=True):
            chosen = places[window.sequence]
            if len(chosen):
                losses[window.sequence] = -row[batch.first + chosen, sequences[window.sequence][chosen]].mean()
    return losses


def composition_losses(known: list[np.ndarray], sequences: list[np.ndarray], places: list[np.ndarray]) -> np.ndarray:
    """Return the mean loss at the same positions of predicting from a protein's composition, in nats, [proteins].

    The composition is that of its residues that are not masked, with the composition of the training data as 20
    additional residues.
    """
    overall = np.bincount(np.concatenate(known), minlength=33) + 1.0
    losses = np.full(len(sequences), np.nan)
    for number, (ids, chosen) in enumerate(zip(sequences, places, strict=True)):
        if len(chosen):
            counts = np.bincount(np.delete(ids, chosen), minlength=33) + 20 * overall / overall.sum()
            losses[number] = -np.log(counts / counts.sum())[ids[chosen]].mean()
    return losses


def ngram_perplexities(training: list[np.ndarray], held_out: list[np.ndarray]) -> tuple[float, float]:
    """Return the perplexity of residues by their frequency in the training data, and by that after the previous one."""
    single, pairs = np.ones(33), np.ones((33, 33))
    for ids in training:
        np.add.at(single, ids, 1)
        np.add.at(pairs, (ids[:-1], ids[1:]), 1)
    unigram = np.log(single / single.sum())
    bigram = np.log(pairs / pairs.sum(axis=1, keepdims=True))
    residues, followers = np.concatenate(held_out), [bigram[ids[:-1], ids[1:]] for ids in held_out]
    return float(np.exp(-unigram[residues].mean())), float(np.exp(-np.concatenate(followers).mean()))


def measure(model: MLXEsmForMaskedLM, training: list[str], held_out: list[str]) -> dict[str, float]:
    """Return perplexities on held-out proteins, of the model and of baselines.

    "lead" is the advantage over each protein's own composition in nats per residue; its error is the standard error of
    the mean over proteins.
    """
    vocabulary = Vocabulary(esm2_tokenizer())
    known = [vocabulary.encode(sequence) for sequence in training]
    ids = [vocabulary.encode(sequence)[: CONTEXT - 2] for sequence in held_out]
    rng = np.random.default_rng(1)
    shuffled = [rng.permutation(row) for row in ids]
    places, shuffled_places = masked_places(vocabulary, ids), masked_places(vocabulary, shuffled)
    losses = masked_losses(model, vocabulary, ids, places)
    on_shuffled = masked_losses(model, vocabulary, shuffled, shuffled_places)
    own = composition_losses(known, ids, places)
    lead = own - losses
    shuffled_lead = composition_losses(known, shuffled, shuffled_places) - on_shuffled
    unigram, bigram = ngram_perplexities(known, ids)
    count = int(np.isfinite(losses).sum())

    def in_errors(x: np.ndarray) -> float:  # mean over proteins / standard error
        return float(np.nanmean(x) / (np.nanstd(x) / np.sqrt(count)))

    return {
        "proteins": count,
        "model": float(np.exp(np.nanmean(losses))),
        "own composition": float(np.exp(np.nanmean(own))),
        "unigram": unigram,
        "bigram": bigram,
        "model on shuffled sequences": float(np.exp(np.nanmean(on_shuffled))),
        "lead": float(np.nanmean(lead)),
        "lead / error": in_errors(lead),
        "lead on shuffled": float(np.nanmean(shuffled_lead)),
        "lead on shuffled / error": in_errors(shuffled_lead),
    }


def card(found: dict[str, float], facts: dict[str, str]) -> str:
    """Return the text of the model card."""
    names = ("model", "own composition", "bigram", "unigram", "model on shuffled sequences")
    table = "".join(f"| {name} | {found[name]:.2f} |\n" for name in names)
    listed = "".join(f"- {name}: {value}\n" for name, value in facts.items())
    return f"""# A small ESM-2 for trying things out

It is far too small for answers about proteins. Use a real model, such as `facebook/esm2_t33_650M_UR50D`, for those. It
has no contact head, because masked language modelling does not train one: `mlx-esm contacts` refuses it.

{listed}
## Perplexity

At masked residues (15% of each protein) of {found["proteins"]} held-out proteins. None of them has a homologue in
the training data (mmseqs2: clusters of 30% identity, then a search with E < 0.001).

| | perplexity |
|---|---|
{table}
The model is better than each protein's own composition by {found["lead"]:.3f} nats per residue, which is
{found["lead / error"]:.1f} standard errors over proteins. On shuffled sequences it is better by
{found["lead on shuffled"]:.3f} nats, {found["lead on shuffled / error"]:.1f} standard errors.

`examples/train_demo_model.py` is the recipe, and prints these numbers.
"""


def main() -> None:
    """Train the model, measure it and write it with its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("proteins", help="a FASTA file, plain or compressed")
    parser.add_argument("output", type=Path, help="the folder to write")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    options = parser.parse_args()

    work = options.output.with_name(f"{options.output.name}-training")
    if not (work / "split.json").exists():
        work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            sides = split_by_homology(list(read_proteins(options.proteins)), Path(folder))
        for name, proteins in zip(("training", "held_out"), sides, strict=True):
            write_fasta(work / f"{name}.fasta", proteins)
        (work / "split.json").write_text(json.dumps([len(side) for side in sides]))
    began = time.perf_counter()
    pretrain(
        [work / "training.fasta"], work / "run", SHAPE, validation=work / "held_out.fasta", context=CONTEXT,
        max_steps=options.steps, batch_tokens=options.batch_tokens, learning_rate=options.learning_rate,
        lr_scheduler_type="cosine", warmup_steps=0.03, weight_decay=0.01, adam_beta2=0.98, logging_steps=50,
        eval_strategy="steps", eval_steps=500, save_steps=500, save_total_limit=1,
    )  # fmt: skip
    minutes = (time.perf_counter() - began) / 60
    model = MLXEsmForMaskedLM.from_pretrained(work / "run")
    sides = [
        [protein.sequence for protein in read_proteins(work / f"{name}.fasta")] for name in ("training", "held_out")
    ]
    found = measure(model, *sides)
    last = json.loads((work / "run" / "log.jsonl").read_text().splitlines()[-2])
    facts = {
        "Parameters": f"{model.num_parameters():,}: {SHAPE[0]} layers of width {SHAPE[1]}, {SHAPE[2]} heads",
        "Data": f"{len(sides[0]):,} proteins of UniProt (CC BY 4.0)",
        "Training": f"{options.steps:,} steps, {last['tokens']:,} tokens, {minutes:.0f} minutes on a CPU",
    }
    model.half().save_pretrained(options.output)
    esm2_tokenizer().save_pretrained(options.output)
    (options.output / "README.md").write_text(card(found, facts))
    shutil.copy(work / "run" / "log.jsonl", options.output / "log.jsonl")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
