"""Fine-tuning: the split of a table, and what a resumed run compares."""

import shutil

import numpy as np
import pytest

from mlx_esm_hf import demo_model
from mlx_esm_hf.data.proteins import STANDARD, Report
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.models.esm.tokenization_esm import esm2_tokenizer
from mlx_esm_hf.training.finetune import finetune, split_by_sequence
from mlx_esm_hf.training.tables import read_table
from tests.jobs.models import write_model


def test_duplicates_are_on_the_same_side(tmp_path):
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ACDEFGHIKL"), 12)) for _ in range(200)] * 2
    text = "".join(f"{sequence},{i % 3}\n" for i, sequence in enumerate(sequences))
    path = tmp_path / "table.csv"
    path.write_text("sequence,label\n" + text)
    data = read_table(path, "classification", Vocabulary(esm2_tokenizer()), Report())
    training, held_out = split_by_sequence(data, 0.2)
    assert len(training) + len(held_out) == 400
    assert not set(training.sequences) & set(held_out.sequences)
    with pytest.raises(ValueError, match="leave no training or no validation data"):
        split_by_sequence(data.subset([0, 1]), 0.0)


GG = [f"GG{residue}" for residue in STANDARD]  # of these, MKA and MKG, only MKA, MKG and GGA are held out


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("classification", {"MKA": "b", "MKG": "b"} | dict.fromkeys(GG, "a"), "part contains only the class 'a'"),
        ("residues", {"MKA": "EEE", "MKG": "E-E"} | dict.fromkeys(GG, "HH-"), "part contains only the class 'H'"),
        ("residues", dict.fromkeys(GG, "HE-") | {"GGA": "---"}, "The evaluation set has no labels"),
        ("regression", dict.fromkeys(GG, 1) | {"GGA": 0}, "spearman is undefined: all 1 labels are 0.0"),
    ],
)
def test_labels_that_do_not_suit_are_refused_before_the_model_is_loaded(task, labels, message, tmp_path, monkeypatch):
    monkeypatch.delattr("mlx_esm_hf.training.finetune.load_model_for")
    path = tmp_path / "table.csv"
    path.write_text("sequence,label\n" + "".join(f"{sequence},{label}\n" for sequence, label in labels.items()))
    with pytest.raises(ValueError, match=f"{message}.* validation table"):
        finetune(path, tmp_path / "out", demo_model(), task=task, validation_share=0.2)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A fine-tuning that was stopped in its final save, its model and its tables."""
    folder = tmp_path_factory.mktemp("interrupted")
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ACDEFGHIKL"), 12)) for _ in range(40)]
    for name, rows in (("t", sequences), ("v", sequences[:9])):
        lines = "".join(f"{sequence},{'KR'[i % 2]},{'RK'[i % 2]}\n" for i, sequence in enumerate(rows))
        (folder / f"{name}.csv").write_text("sequence,label,other\n" + lines)
    write_model(folder / "model", seed=0)
    write_model(folder / "model2", seed=1)
    finetune(folder / "t.csv", folder / "out", str(folder / "model"), **SMALL)
    for path in (folder / "out").iterdir():
        if path.is_file():
            path.unlink()
    return folder


SMALL = {"num_train_epochs": 1, "seed": 3, "disable_tqdm": True}
OTHERS = {
    "rank": (4, "rank: 8; now: 4"),
    "alpha": (64, "alpha: 16; now: 64"),
    "dropout": (0.5, "dropout: 0.0; now: 0.5"),
    "target_modules": (["query"], "target_modules: query, key, value; now: query"),
    "train": ("dora", "train: lora; now: dora"),
    "merge": (True, "merge: False; now: True"),
    "task": ("residues", "task: classification; now: residues"),
    "label_column": ("other", "label_column: label; now: other"),
    "validation": ("v.csv", r"validation data: t\.csv; now: v\.csv"),
    "validation_share": (0.3, "validation_share: 0.1; now: 0.3"),
    "metrics": (["accuracy"], "metrics: accuracy, matthews_corrcoef; now: accuracy"),
    "model": ("model2", "model: .*model; now: .*model2"),
    "num_train_epochs": (2, "num_train_epochs: 1; now: 2"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_resuming_with_another_option_is_refused(name, interrupted):
    value, message = OTHERS[name]
    if name in ("validation", "model"):
        value = str(interrupted / value)
    table = "t.csv"
    if name == "task":  # a label for each residue
        table = "r.csv"
        lines = (interrupted / "t.csv").read_text().splitlines()[1:]
        rows = "".join(f"{line.split(',')[0]},{'HE' * 6}\n" for line in lines)
        (interrupted / table).write_text("sequence,label\n" + rows)
    options = {"model": str(interrupted / "model"), **SMALL, name: value}
    with pytest.raises(ValueError, match=f"belongs to a training with other settings.*{message}"):
        finetune(interrupted / table, interrupted / "out", **options)


def test_resuming_with_another_table_is_refused_and_an_equal_one_accepted(interrupted, tmp_path):
    shutil.copytree(interrupted / "out", tmp_path / "out")
    text = (interrupted / "t.csv").read_text()
    (tmp_path / "t.csv").write_text(text.replace(",K,", ",X,").replace(",R,", ",K,").replace(",X,", ",R,"))
    with pytest.raises(ValueError, match=r"\(training data: other content in t\.csv"):
        finetune(tmp_path / "t.csv", tmp_path / "out", str(interrupted / "model"), **SMALL)
    (tmp_path / "renamed.csv").write_text(text)
    finetune(tmp_path / "renamed.csv", tmp_path / "out", str(interrupted / "model"), **SMALL)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
