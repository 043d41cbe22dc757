"""What ranks tell each other."""

import mlx.core as mx
import pytest

from mlx_esm_hf.runtime import distributed


def test_what_a_dead_rank_seems_to_send_is_not_taken(monkeypatch):
    """MLX does not say that a rank is gone: its part of what is gathered is what lay in memory."""
    monkeypatch.setattr(distributed, "size", lambda: 2)
    alive = [True]
    kept = {}

    def all_gather(x, stream):
        # The other rank is one that sends the same; of a dead one there is what it sent before.
        other = x if alive[0] else kept[x.dtype]
        kept[x.dtype] = other
        return mx.concatenate([x, other])

    monkeypatch.setattr(mx.distributed, "all_gather", all_gather)
    assert distributed.gather(b"first", 0) == [b"first", b"first"]
    alive[0] = False
    with pytest.raises(OSError, match="Another rank has ended. All finished work is kept"):
        distributed.gather(b"later", 1)
