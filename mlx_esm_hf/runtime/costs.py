"""Batch costs and sizes that depend on the device, with the measurements they come from."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class Costs(NamedTuple):
    """How work should be batched on one kind of device.

    Attributes:
        max_batch_tokens: maximum tokens in a batch of a language model.
        launch_tokens: overhead of launching such a batch, in tokens computed in the same time.
        contact_launch_pairs: overhead of launching a batch of contact maps, in token pairs computed in the same time.
        fold_batch_tokens: residues in a batch that is folded.
        fold_launch_pairs: overhead of launching such a batch, in residue pairs computed in the same time.
    """

    max_batch_tokens: int
    launch_tokens: int
    contact_launch_pairs: int
    fold_batch_tokens: int
    fold_launch_pairs: int


CPU = Costs(
    max_batch_tokens=2048,
    launch_tokens=16,  # an estimate
    contact_launch_pairs=64**2,  # measured in rows of 130 tokens: 3,300 with ESM-2 8M, 4,300 with 150M
    fold_batch_tokens=256,  # larger batches are no faster, and a killed run loses the batch it computes
    fold_launch_pairs=700,  # measured
)
GPU = Costs(
    max_batch_tokens=16384,
    # An H200 launches a batch of ESM-2 650M in 11 ms, the time of about 1,400 tokens in bfloat16 and 300 in float32.
    # Bulk work on a GPU is mostly done in bfloat16.
    launch_tokens=1024,
    contact_launch_pairs=512**2,  # an estimate; puts as many rows together as a batch may hold
    fold_batch_tokens=1024,  # the default of fair-esm
    fold_launch_pairs=128**2,  # an estimate
)


def costs() -> Costs:
    """Return the costs of MLX's default device."""
    return CPU if mx.default_device() == mx.cpu else GPU
