"""The split of a table into training and validation data."""

import numpy as np
import pytest

from mlx_esm_hf.data.proteins import Report
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.models.esm.tokenization_esm import esm2_tokenizer
from mlx_esm_hf.training.finetune import split_by_sequence
from mlx_esm_hf.training.tables import read_table


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
