"""The diffusion sampler of ESMFold2: from random positions of atoms to a structure, in float32.

Source: Abramson et al. 2024 (doi:10.1038/s41586-024-07487-w), Supplement, Algorithms 18, 19 and 28. The schedule is
that of Karras et al. 2022 (arXiv:2206.00364).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_esm_hf.errors import UserError

# Numbers of the draws: a key is folded with one of them.
STATE, KEEP, START, ROTATION, TRANSLATION, NOISE = range(6)


class Draws:
    """The random numbers of a fold.

    They depend on the seed, the protein's own size and the number of the sample, and not on the batch, padding or the
    number of samples.

    Args:
        seed: any integer from 0.
        tokens: number of tokens of each protein of the batch.
        atoms: number of atoms of each protein.
    """

    def __init__(self, seed: int, tokens: Sequence[int], atoms: Sequence[int]):
        self.seed, self.tokens, self.atoms = seed, tokens, atoms

    def key(self, *numbers: int) -> mx.array:
        """Return the key of a draw."""
        key = mx.random.key(self.seed)
        for number in numbers:
            key = mx.random.split(key, number + 1)[number]
        return key

    def state(self, width: int, std: float) -> mx.array:
        """Return the initial pair states [B, L, L, width]: normal, cut at 3 standard deviations; 0 at padding."""
        key = self.key(STATE)
        draws = [std * mx.random.truncated_normal(-3, 3, (n, n, width), key=key) for n in self.tokens]
        return padded(draws, max(self.tokens))

    def keep(self, loop: int, width: int, p: float) -> mx.array:
        """Return the mask [B, L, L, width] of the elements that dropout with probability p keeps in a loop."""
        key = self.key(KEEP, loop)
        return padded([mx.random.bernoulli(1 - p, (n, n, width), key) for n in self.tokens], max(self.tokens))

    def start(self, row: int, samples: range) -> mx.array:
        """Return normal numbers [S, A, 3] for the first positions of samples of one protein."""
        return mx.stack([mx.random.normal((self.atoms[row], 3), key=self.key(START, s)) for s in samples])

    def rotations(self, row: int, samples: range, step: int) -> mx.array:
        """Return normal numbers [S, 4]: quaternions of the random rotations of a step."""
        return mx.stack([mx.random.normal((4,), key=self.key(ROTATION, s, step)) for s in samples])

    def translations(self, row: int, samples: range, step: int) -> mx.array:
        """Return normal numbers [S, 1, 3]: random translations of a step, in Å."""
        return mx.stack([mx.random.normal((1, 3), key=self.key(TRANSLATION, s, step)) for s in samples])

    def noise(self, row: int, samples: range, step: int) -> mx.array:
        """Return normal numbers [S, A, 3] for the noise of a step."""
        return mx.stack([mx.random.normal((self.atoms[row], 3), key=self.key(NOISE, s, step)) for s in samples])


def padded(pairs: Sequence[mx.array], length: int) -> mx.array:
    """Stack arrays [n, n, C] of different n into [B, length, length, C], with zeros on the right."""
    widths = [length - len(x) for x in pairs]
    return mx.stack([mx.pad(x, [(0, n), (0, n), (0, 0)]) if n else x for x, n in zip(pairs, widths, strict=True)])


# The schedule


def noise_schedule(head: Any, num_steps: int | None = None) -> np.ndarray:
    """Return the noise levels of a schedule of `num_steps` steps and the final 0, in Å, float32 [num_steps + 1].

    Args:
        head: config of the structure head.
        num_steps: steps; None for the config's number.

    Raises:
        UserError: `num_steps` is below 1.
    """
    steps = head.inference_num_steps if num_steps is None else num_steps
    if steps < 1:
        raise UserError(f"num_sampling_steps must be at least 1, got {steps}.")
    sigma = head.diffusion_module.sigma_data
    if steps == 1:
        return np.array([head.inference_sigma_max_ratio * sigma, 0], dtype=np.float32)
    power = 1 / head.inference_exponent
    first, last = head.inference_sigma_max_ratio**power, head.inference_sigma_min_ratio**power
    ramp = np.arange(steps, dtype=np.float32) / np.float32(steps - 1)
    levels = sigma * (np.float32(first) + ramp * np.float32(last - first)) ** np.float32(head.inference_exponent)
    return np.append(levels, 0).astype(np.float32)


def capped_schedule(head: Any, num_steps: int | None = None) -> list[tuple[float, float, float]]:
    """Return (level, next level, churn) of each call of the denoiser: levels above the cap are replaced by the cap.

    Args:
        head: config of the structure head.
        num_steps: steps of the schedule before it is cut; None for the config's number.
    """
    levels = noise_schedule(head, num_steps)
    if head.inference_sigma_cap is not None:
        levels = np.append(np.float32(head.inference_sigma_cap), levels[levels <= head.inference_sigma_cap])
    churn = np.where(levels > head.gamma_min, np.float32(head.gamma_0), 0)
    return [(float(a), float(b), float(c)) for a, b, c in zip(levels[:-1], levels[1:], churn[1:], strict=True)]


# Geometry


def rotation_matrices(quaternions: mx.array) -> mx.array:
    """Return the rotation matrices [S, 3, 3] of quaternions [S, 4] of any length, to multiply from the right."""
    r, i, j, k = (quaternions / mx.linalg.norm(quaternions, axis=-1, keepdims=True)).T
    rows = [
        [1 - 2 * (j * j + k * k), 2 * (i * j - k * r), 2 * (i * k + j * r)],
        [2 * (i * j + k * r), 1 - 2 * (i * i + k * k), 2 * (j * k - i * r)],
        [2 * (i * k - j * r), 2 * (j * k + i * r), 1 - 2 * (i * i + j * j)],
    ]
    return mx.stack([mx.stack(row, axis=-1) for row in rows], axis=-2)


def augmented(x: mx.array, mask: mx.array, rotations: mx.array, translations: mx.array) -> mx.array:
    """Return positions that are centred, rotated and moved.

    Args:
        x: [S, A, 3], in Å.
        mask: [1, A, 1], 0 for atoms that do not count for the centre.
        rotations: [S, 4], quaternions.
        translations: [S, 1, 3], in Å.
    """
    centre = (x * mask).sum(axis=1, keepdims=True) / mx.maximum(mask.sum(axis=1, keepdims=True), 1)
    return (x - centre) @ rotation_matrices(rotations) + translations


def aligned(x: mx.array, target: mx.array, mask: mx.array) -> mx.array:
    """Return positions superposed onto others by the rotation and translation with the least squared distance.

    NumPy computes it in float64: at high noise the singular values of the covariance are almost equal, and float32
    loses 1e-3 Å.

    Args:
        x: [S, A, 3], in Å.
        target: [S, A, 3], in Å.
        mask: [1, A, 1], 0 for atoms that do not count.

    Raises:
        FloatingPointError: positions are NaN or infinite.

    Source: Kabsch 1976 (doi:10.1107/S0567739476001873).
    """
    moved, fixed, weights = (np.array(array).astype(np.float64) for array in (x, target, mask))
    total = np.maximum(weights.sum(axis=1, keepdims=True), 1e-8)
    moved -= (moved * weights).sum(axis=1, keepdims=True) / total
    centre = (fixed * weights).sum(axis=1, keepdims=True) / total
    covariance = ((fixed - centre) * weights).swapaxes(1, 2) @ moved
    if not np.isfinite(covariance).all():
        raise FloatingPointError("The positions of the denoiser are NaN or infinite.")
    left, _, right = np.linalg.svd(covariance)
    left[:, :, 2] *= np.linalg.det(left @ right)[:, None]  # a rotation, not a reflection
    return mx.array((moved @ (left @ right).swapaxes(1, 2) + centre).astype(np.float32))


# The sampler


def sample(
    denoise: Callable[[mx.array, mx.array], mx.array],
    mask: mx.array,
    head: Any,
    draws: Draws,
    row: int,
    samples: range,
    num_steps: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> mx.array:
    """Return structures [S, A, 3] of one protein, in Å. Their poses are arbitrary.

    Args:
        denoise: function of noisy positions [S, A, 3] and the noise level [1] that returns denoised positions.
        mask: [A], True for atoms.
        head: config of the structure head.
        draws: the random numbers.
        row: number of the protein in the batch.
        samples: numbers of the samples.
        num_steps: see `noise_schedule`.
        on_step: called with (step, steps) before each step, from 1.
    """
    steps = capped_schedule(head, num_steps)
    weights = mask.astype(mx.float32)[None, :, None]
    x = steps[0][0] * draws.start(row, samples)
    for number, (level, next_level, churn) in enumerate(steps):
        if on_step is not None:
            on_step(number + 1, len(steps))
        x = augmented(x, weights, draws.rotations(row, samples, number), draws.translations(row, samples, number))
        raised = level * (1 + churn)
        std = head.noise_scale * max(raised**2 - level**2, 0) ** 0.5
        x = x + std * draws.noise(row, samples, number)
        denoised = denoise(x, mx.array([raised], dtype=mx.float32))
        x = aligned(x, denoised, weights)
        x = x + head.step_scale * (next_level - raised) * (x - denoised) / raised
        mx.eval(x)
    return x
