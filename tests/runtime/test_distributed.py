"""Communication between ranks."""

import sys

import mlx.core as mx
import pytest

from mlx_esm_hf.runtime import distributed
from tests.processes import LOST_RANK, start_ranks


def test_data_of_a_dead_rank_is_rejected(monkeypatch):
    """MLX does not always report that a rank has ended: it may return uninitialised memory in place of its data."""
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "_lost", False)
    alive = [True]
    kept = {}

    def all_gather(x, stream):
        # The other rank sends the same data; after it has ended, its earlier data is still in memory.
        other = x if alive[0] else kept[x.dtype]
        kept[x.dtype] = other
        return mx.concatenate([x, other])

    monkeypatch.setattr(mx.distributed, "all_gather", all_gather)
    assert distributed.gather(b"first", 0) == [b"first", b"first"]
    alive[0] = False
    with pytest.raises(RuntimeError, match="Another process of this run was lost.*run the same command again"):
        distributed.gather(b"later", 1)


CALLS = """
import mlx.core as mx
from mlx_esm_hf.runtime import distributed as d

def fail():
    raise OSError("the disk is full")

for call in (lambda: d.all_sum(1), lambda: d.all_sum_array(mx.ones(3)), lambda: d.all_min(1),
             lambda: d.gather(b"x", 0), lambda: d.average_gradients({"w": mx.ones(3)}),
             lambda: d.on_rank_0(lambda: 1), lambda: d.on_rank_0(fail)):
    try:
        call()
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_every_collective_call_reports_a_lost_rank(tmp_path):
    survivor, _ = start_ranks([sys.executable, "-c", CALLS], LOST_RANK, folder=tmp_path)
    said = survivor.communicate(timeout=100)[0].splitlines()
    assert said[:-1] == [f"UserRuntimeError {distributed.LOST}"] * 6
    assert said[-1] == "OSError the disk is full"  # the first error is the one to report
