"""Pretraining: new models, and what a resumed run compares."""

import shutil

import numpy as np
import pytest

from mlx_esm_hf import EsmTokenizer
from mlx_esm_hf.models.esm.tokenization_esm import esm2_tokenizer
from mlx_esm_hf.training.pretrain import pretrain
from tests.jobs.models import write_model


def test_the_tokenizer_of_a_new_model_equals_the_published_one(tmp_path):
    esm2_tokenizer().save_pretrained(tmp_path)
    loaded = EsmTokenizer.from_pretrained(tmp_path)
    assert loaded("MKT<mask>AXBUZO.-")["input_ids"] == [0, 20, 15, 11, 32, 5, 24, 25, 26, 27, 28, 29, 30, 2]
    assert (loaded.pad_token_id, loaded.unk_token_id, len(loaded)) == (1, 3, 33)


SMALL = {"max_steps": 2, "save_steps": 2, "batch_tokens": 512, "validation_share": 0.2, "disable_tqdm": True}
SHAPE = (1, 16, 2)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A training that was stopped in its final save, its proteins and a model."""
    folder, rng = tmp_path_factory.mktemp("interrupted"), np.random.default_rng(0)
    records = [f">{i}\n{''.join(rng.choice(list('ACDEFGHIKL'), 30))}\n" for i in range(40)]
    (folder / "a.fasta").write_text("".join(records))
    (folder / "b.fasta").write_text("".join(records[:10]))
    write_model(folder / "model")
    pretrain([folder / "a.fasta"], folder / "out", SHAPE, **SMALL)
    for path in (folder / "out").iterdir():
        if path.is_file():
            path.unlink()
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": (1, 32, 2)}, "model: a new one of shape 1,16,2; now: a new one of shape 1,32,2"),
        ({"model": "model"}, "model: a new one of shape 1,16,2; now: .*model"),
        ({"context": 20}, "context: 512; now: 20"),
        ({"weights": [2]}, "weights: not set; now: 2"),
        ({"validation_share": 0.1}, "validation_share: 0.2; now: 0.1"),
        ({"validation": "b.fasta"}, r"validation data: a\.fasta; now: b\.fasta"),
        ({"proteins": ["a.fasta", "b.fasta"]}, r"training data: a\.fasta; now: a\.fasta, b\.fasta"),
        ({"proteins": ["b.fasta"]}, r"training data: a\.fasta; now: b\.fasta"),
        ({"seed": 1}, "seed: 42; now: 1"),
    ],
)
def test_resuming_with_another_option_is_refused(change, message, interrupted, tmp_path):
    shutil.copytree(interrupted / "out", tmp_path / "out")
    options = {"proteins": ["a.fasta"], "model": SHAPE, **SMALL, **change}
    proteins = [interrupted / name for name in options.pop("proteins")]
    for name in ("model", "validation"):
        if isinstance(options.get(name), str):
            options[name] = str(interrupted / options[name])
    with pytest.raises(ValueError, match=f"belongs to a training with other settings.*{message}"):
        pretrain(proteins, tmp_path / "out", **options)


def test_resuming_with_reordered_proteins_is_refused_and_with_other_ids_accepted(interrupted, tmp_path):
    shutil.copytree(interrupted / "out", tmp_path / "out")
    records = (interrupted / "a.fasta").read_text().split(">")[1:]
    fasta = tmp_path / "a.fasta"
    fasta.write_text("".join(f">{record}" for record in reversed(records)))
    with pytest.raises(ValueError, match=r"\(training data: other content in a\.fasta"):
        pretrain([fasta], tmp_path / "out", SHAPE, **SMALL)
    fasta.write_text("".join(f">protein {record}" for record in records))
    pretrain([fasta], tmp_path / "out", SHAPE, **SMALL)
    assert (tmp_path / "out" / "model.safetensors").exists()
