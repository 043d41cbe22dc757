"""Communication between ranks."""

import mlx.core as mx
import pytest

from mlx_esm_hf.runtime import distributed


def test_data_of_a_dead_rank_is_rejected(monkeypatch):
    """MLX does not report that a rank has ended, and returns uninitialised memory in place of its data."""
    monkeypatch.setattr(distributed, "size", lambda: 2)
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
    with pytest.raises(OSError, match="Another rank has ended. All finished work is kept"):
        distributed.gather(b"later", 1)
