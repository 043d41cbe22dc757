"""Damaged manifests."""

import json

import pytest

from mlx_esm_hf.runs.job import no_progress
from mlx_esm_hf.runs.outputs import earlier_settings
from mlx_esm_hf.runs.run import compute_run
from tests.runs.test_run import digests, small_job

WHOLE = {
    "version": 1,
    "command": "test",
    "settings": {},
    "input": {"name": "x", "sha256": "y"},
    "items": 6,
    "shards": 6,
    "left_out": [],
}


ODD_MANIFESTS = [
    "",
    "3",
    "[" * 100_000,
    *(
        json.dumps(WHOLE | {key: value})
        for key, value in [
            *((name, odd) for name in ("command", "settings", "input", "left_out") for odd in (None, 3, [3], True)),
            *((name, odd) for name in ("items", "shards") for odd in (None, "6", 0, -1, 1.5, True, [6])),
            ("left_out", "text"),
            ("settings", {"batch_tokens": "256"}),
            ("settings", {"memory": []}),
        ]
    ),
    *(json.dumps({k: v for k, v in WHOLE.items() if k != key}) for key in WHOLE if key != "version"),
]


@pytest.mark.parametrize("text", ODD_MANIFESTS, ids=lambda text: text[-60:])
def test_damaged_manifest_is_refused(text, tmp_path):
    compute_run(small_job(), tmp_path / "out", no_progress)
    before = digests(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="manifest.json is not the manifest of a run. Remove"):
        compute_run(small_job(), tmp_path / "out", no_progress)
    with pytest.raises(ValueError, match="manifest.json is not the manifest of a run. Remove"):
        earlier_settings(tmp_path / "out")
    assert digests(tmp_path / "out") == before


def test_manifest_with_too_many_shards(tmp_path):
    compute_run(small_job(), tmp_path / "out", no_progress)
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(WHOLE | {"shards": 10**15}))
    assert compute_run(small_job(), tmp_path / "out", no_progress).manifest["shards"] == 6
