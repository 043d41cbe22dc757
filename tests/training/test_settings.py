"""What determines the result of a training, and how it is compared."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_esm_hf.training.settings import checksum_of_arrays, checksum_of_items, content, differences

COLUMNS = ["input_ids", "labels"]
ROWS = [{"input_ids": [0, 5, i, 2], "labels": i % 2, "name": f"p{i}"} for i in range(4, 24)]


@pytest.mark.parametrize(
    ("before", "now", "text"),
    [
        (8, 4, ["rank: 8; now: 4"]),
        (None, 0.5, ["rank: not set; now: 0.5"]),
        (["query", "key"], ["query"], ["rank: query, key; now: query"]),
        (1, 1.0, []),
        (content("t.csv", "1"), content("t.csv", "2"), ["rank: other content in t.csv"]),
        (content("t.csv", "1"), content("u.csv", "2"), ["rank: t.csv; now: u.csv"]),
        (content("t.csv", "1"), content("u.csv", "1"), []),
        (content("", "1"), content("", "2"), ["rank: other content"]),
        ("a new one of shape 2,32,4", content("m", "1"), ["rank: a new one of shape 2,32,4; now: m"]),
    ],
)
def test_differences(before, now, text):
    assert differences({"rank": before, "seed": 0}, {"rank": now, "seed": 0}) == text


def test_the_checksum_of_items_follows_their_values():
    checksum = checksum_of_items(ROWS, COLUMNS)
    arrays = [{**row, "input_ids": np.array(row["input_ids"]), "name": "another"} for row in ROWS]
    assert checksum_of_items(arrays, COLUMNS) == checksum
    flipped = [{**row, "labels": 1 - row["labels"]} for row in ROWS]
    others = [flipped, ROWS[::-1], ROWS[:-1], [*ROWS[:-1], ROWS[0]]]
    assert len({checksum, *(checksum_of_items(rows, COLUMNS) for rows in others)}) == 5


def test_random_items_have_no_checksum():
    class Random(list):
        def __getitem__(self, index):
            return {"input_ids": np.random.random(4)}

    assert checksum_of_items(Random(ROWS), COLUMNS) is None


def test_the_checksum_of_arrays_follows_names_shapes_dtypes_and_elements():
    x = mx.arange(12, dtype=mx.float32)
    trees = [{"a": x}, {"b": x}, {"a": x.reshape(3, 4)}, {"a": x.astype(mx.bfloat16)}, {"a": x + 1}, {"a": x, "c": x}]
    assert len({checksum_of_arrays(tree) for tree in trees}) == len(trees)
    assert checksum_of_arrays({"c": x, "a": x}) == checksum_of_arrays({"a": x, "c": x})
