"""The parts of ESMFold2 compared with transformers, each with its gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

from mlx_esm_hf.modeling_layers import module_at
from mlx_esm_hf.models.esmfold2.atoms import AtomContext, modulations_of
from mlx_esm_hf.models.esmfold2.diffusion import Conditioning
from tests.bar import hold_to_bar
from tests.models.esmfold2.oracle import Peers, as_torch, batch, peers
from tests.parity import one_thread

B, L, M, A, C = 2, 9, 5, 76, 24
MASK = (np.arange(L) < np.array([[9], [6]])).astype(np.float32)
PAIRS = MASK[:, :, None] * MASK[:, None]
ATOMS = np.arange(A) < np.array([[76], [50]])
ROWS = np.broadcast_to(MASK[:, :, None], (B, L, M)).copy()
ROWS[0, 2, 3] = 0
TOKEN = np.sort(np.random.default_rng(0).integers(0, 6, (B, A)), axis=1) * ATOMS
PROTEINS = {"MKTAYIAKQ": 1, "AC:GWFX": 1}
SHAPES = {
    "s": (B, L, 87),
    "c": (B, L, C),
    "z": (B, L, L, C),
    "m": (B, L, M, 18),
    "d": (B, L, 30),
    "a": (B, A, 32),
    "e": (B, A, 28),
    "x": (B, A, 3),
    "h": (B, L, 3, 36),
    "w": (B, 5, L, L),
}
KEPT = {"pairs": PAIRS, "tokens": MASK, "rows": ROWS, "atoms": ATOMS, "all": np.ones(())}

Call = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Peers:
    return peers(tmp_path_factory.mktemp("parts"))


def features() -> dict[str, np.ndarray]:
    return batch(PROTEINS)


def mlx_features() -> dict[str, mx.array]:
    return {name: mx.array(x) for name, x in features().items()}


def like(x: Any, array: Any) -> Any:
    """Return an array as a tensor of the dtype of x, or as an integer or a bool."""
    given = torch.tensor(np.asarray(array))
    return given.to(x.dtype) if given.is_floating_point() else given


def rotary(width: int) -> tuple[np.ndarray, np.ndarray]:
    angles = np.random.default_rng(3).uniform(-3, 3, (B, A, width)).astype(np.float32)
    return np.cos(angles), np.sin(angles)


def window(x: Any) -> Any:
    """Return transformers' additive mask of the window [B, 1, A, A]."""
    near = np.abs(np.arange(A)[:, None] - np.arange(A)) <= 8
    least = torch.tensor(torch.finfo(x.dtype).min, dtype=x.dtype)
    return torch.where(torch.tensor(near & ATOMS[:, None])[:, None], torch.zeros((), dtype=x.dtype), least)


def both(x: Any, angles: tuple[np.ndarray, np.ndarray]) -> tuple[Any, Any]:
    return tuple(torch.cat([like(x, angle)] * 2, dim=-1) for angle in angles)  # type: ignore[return-value]


def context(embeds: Any, width: int) -> AtomContext:
    return AtomContext(embeds, tuple(map(mx.array, rotary(width))), mx.array(ATOMS), mx.array(TOKEN), L)  # type: ignore


def our_encoder(m: Any, h: Any, a: Any) -> Any:
    tokens, atoms = m(h, modulations_of(m.layers, a), context(a, 4))
    return mx.concatenate([tokens.flatten(1), (atoms * mx.array(ATOMS)[..., None]).flatten(1)], axis=1)


def their_encoder(m: Any, h: Any, a: Any) -> Any:
    mask, token = torch.tensor(ATOMS), torch.tensor(TOKEN)
    tokens, atoms = m(h, a, window(h), both(h, rotary(4)), mask, token, L)
    return torch.cat([tokens.flatten(1), (atoms * mask[..., None]).flatten(1)], dim=1)


def their_inputs(m: Any, *_: Any) -> Any:
    """Return what transformers' embedder makes of the features of `PROTEINS`."""
    dtype = next(m.parameters()).dtype
    module = __import__(type(m).__module__, fromlist=["EsmFold2AtomInputs"])
    given = as_torch(features(), dtype)
    one_hot = torch.nn.functional.one_hot
    mask, atoms = given["attention_mask"], given["atom_attention_mask"]
    types = one_hot(given["res_type"], 33).to(dtype) * mask[..., None]
    names = {name: given[name] for name in module.EsmFold2AtomInputs.__dataclass_fields__}
    names["ref_element"] = one_hot(given["ref_element"], 128).to(dtype) * atoms[..., None]
    names["ref_atom_name_chars"] = one_hot(given["ref_atom_name_chars"], 64).to(dtype) * atoms[..., None, None]
    places = ("token_index", "residue_index", "asym_id", "sym_id", "entity_id", "token_bonds")
    return m(
        atom_inputs=module.EsmFold2AtomInputs(**names),
        res_type_one_hot=types,
        profile=types,
        deletion_mean=given["deletion_mean"],
        num_tokens=mask.shape[1],
        **{name: given[name] for name in places},
    )


def relative(m: Any, kind: Any) -> Any:
    names = ("residue_index", "asym_id", "sym_id", "entity_id", "token_index")
    return m(**{name: torch.tensor(features()[name]).long() for name in names})


def msa_features(m: Any) -> dict[str, Any]:
    draw = np.random.default_rng(5)
    rows = ROWS.swapaxes(1, 2)
    return {
        "msa": draw.integers(1, 23, (B, M, L)),
        "msa_attention_mask": rows > 0,
        "has_deletion": (draw.random((B, M, L)) < 0.3).astype(np.float32) * rows,
        "deletion_value": draw.random((B, M, L)).astype(np.float32) * rows,
        "attention_mask": MASK > 0,
    }


def their_msa(m: Any, z: Any, s: Any) -> Any:
    given = msa_features(m)
    residues = torch.nn.functional.one_hot(torch.tensor(given["msa"]), 33).to(z.dtype).transpose(1, 2)
    rows = like(z, ROWS)
    columns = [like(z, given[name]).transpose(1, 2) for name in ("has_deletion", "deletion_value")]
    return m(z, s, residues * rows[..., None], *columns, rows)


def our_denoiser(m: Any, x: Any, z: Any, r: Any, s: Any) -> Any:
    """Denoise two samples of each protein of the batch."""
    given = mlx_features() | {"attention_mask": mx.array(MASK > 0)}
    made = m.prepare(z, r, s, given)
    two = lambda array: mx.repeat(array, 2, axis=0)  # noqa: E731
    atoms = AtomContext(
        two(made.atoms.embeds),
        tuple(map(two, made.atoms.rotary)),  # type: ignore[arg-type]
        two(made.atoms.mask),
        two(made.atoms.atom_to_token),
        L,
    )
    conditioning = Conditioning(
        atoms, [two(y) for y in made.encoder], [two(y) for y in made.decoder], two(made.singles), made.biases
    )
    return m(two(x), mx.array([3.0, 0.1, 200.0, 12.0]), conditioning)


def their_denoiser(m: Any, x: Any, z: Any, r: Any, s: Any) -> Any:
    module = __import__(type(m).__module__, fromlist=["EsmFold2AtomInputs"])
    given = as_torch(features(), x.dtype)
    atoms = given["atom_attention_mask"]
    names = {name: given[name] for name in module.EsmFold2AtomInputs.__dataclass_fields__}
    one_hot = torch.nn.functional.one_hot
    names["ref_element"] = one_hot(given["ref_element"], 128).to(x.dtype) * atoms[..., None]
    names["ref_atom_name_chars"] = one_hot(given["ref_atom_name_chars"], 64).to(x.dtype) * atoms[..., None, None]
    conditioning = m.prepare_conditioning(
        module.EsmFold2AtomInputs(**names), z, r, s, torch.tensor(MASK > 0), num_diffusion_samples=2
    )
    levels = torch.tensor([3.0, 0.1, 200.0, 12.0], dtype=torch.float32).to(x.dtype)
    return m(x.repeat_interleave(2, 0), levels, conditioning)


# {part: (path, kinds of the inputs, call of our module, call of theirs, what of the output counts)}
PARTS: dict[str, tuple[str, str, Call, Call, str]] = {
    "triangle multiplication, outgoing": (
        *("folding_trunk.layers.0.tri_mul_out", "z"),
        *(lambda m, z: m(z, mx.array(MASK)), lambda m, z: z + m(z, like(z, PAIRS)), "pairs"),
    ),
    "triangle multiplication, incoming": (
        *("folding_trunk.layers.1.tri_mul_in", "z"),
        *(lambda m, z: m(z, mx.array(MASK)), lambda m, z: z + m(z, like(z, PAIRS)), "pairs"),
    ),
    "transition": ("folding_trunk.layers.0.pair_transition", "z", lambda m, z: m(z), lambda m, z: m(z), "pairs"),
    "pair layers": (
        *("folding_trunk", "z"),
        *(lambda m, z: m(z, mx.array(MASK)), lambda m, z: m(z, like(z, PAIRS)), "pairs"),
    ),
    "recurrence": ("parcae", "zz", lambda m, z, y: m(z, y), lambda m, z, y: m(z, y, *m.discretize()), "pairs"),
    "end of the recurrence": (
        *("parcae", "z", lambda m, z: m.decode_state(z, mx.array(MASK))),
        *(lambda m, z: m.decode_state(z, like(z, PAIRS)), "pairs"),
    ),
    "relative positions": (
        *("input_embedder.rel_pos", ""),
        *(lambda m: m(mlx_features()), lambda m: relative(m, None), "pairs of proteins"),
    ),
    "token states of the input": (
        *("input_embedder", ""),
        *(lambda m: m.single_inputs(mlx_features()), lambda m: their_inputs(m)[0], "tokens of proteins"),
    ),
    "pair states of the input": (
        *("input_embedder", ""),
        lambda m: m.initial_pair_states(m.single_inputs(mlx_features()), mlx_features()),
        *(lambda m: their_inputs(m)[1], "pairs of proteins"),
    ),
    "mixture of hidden states": (*("language_model", "h", lambda m, h: m(m.combine(h)), lambda m, h: m(h), "pairs"),),
    "outer product mean of few rows": (
        *("msa_encoder.layers.0.outer_product_mean", "mz"),
        lambda m, x, z: m(x, mx.array(ROWS), z),
        *(lambda m, x, z: z + m(x, like(z, ROWS)), "pairs"),
    ),
    "pair-weighted averaging": (
        *("msa_encoder.layers.0.msa_pair_weighted_averaging", "mz"),
        lambda m, x, z: m(x, z, mx.array(MASK > 0)),
        *(lambda m, x, z: x + m(x, z, torch.tensor(PAIRS > 0)), "rows"),
    ),
    "MSA encoder": (
        *("msa_encoder", "zs"),
        lambda m, z, s: m(z, s, {name: mx.array(x) for name, x in msa_features(m).items()}),
        *(their_msa, "pairs"),
    ),
    "atom attention": (
        *("structure_head.atom_encoder.layers.0.self_attn", "a"),
        lambda m, x: m(x, tuple(map(mx.array, rotary(4))), mx.array(ATOMS)),
        *(lambda m, x: m(x, window(x), both(x, rotary(4)))[0], "atoms"),
    ),
    "atom layer": (
        *("input_embedder.atom_encoder.layers.1", "ee"),
        lambda m, h, a: m(h, m.modulation(a), tuple(map(mx.array, rotary(7))), mx.array(ATOMS)),
        *(lambda m, h, a: m(h, a, window(h), both(h, rotary(7))), "atoms"),
    ),
    "atom encoder": ("structure_head.atom_encoder", "aa", our_encoder, their_encoder, "all"),
    "atom decoder": (
        *("structure_head.atom_decoder", "daa"),
        lambda m, q, h, a: m(q, h, modulations_of(m.layers, a), context(a, 4)),
        lambda m, q, h, a: m(q, h, a, window(h), both(h, rotary(4)), torch.tensor(TOKEN)),
        "atoms",
    ),
    "adaptive norm": (
        *("structure_head.token_transformer.layers.0.input_layernorm", "dd"),
        *(lambda m, x, s: m(x, m.modulation(s)), lambda m, x, s: m(x, s), "tokens"),
    ),
    "token attention": (
        *("structure_head.token_transformer.layers.0.self_attn", "dw"),
        *(lambda m, x, w: m(x, w), lambda m, x, w: m(x, w)[0], "tokens"),
    ),
    "token layer": (
        *("structure_head.token_transformer.layers.1", "ddw"),
        *(lambda m, x, s, w: m(x, m.modulation(s), w), lambda m, x, s, w: m(x, s, w), "tokens"),
    ),
    "conditioning of tokens": (
        *("structure_head.conditioning", "s"),
        lambda m, s: m(mx.array([0.05, 90.0]), m.single_states(s)),
        lambda m, s: m(like(s, np.float32([0.05, 90.0])), m.compute_single_repr(s)),
        "tokens",
    ),
    "conditioning of pairs": (
        *("structure_head.conditioning", "zz"),
        *(lambda m, z, r: m.pair_states(z, r), lambda m, z, r: m.compute_pair_repr(z, r), "pairs"),
    ),
    "denoiser": ("structure_head", "xzzs", our_denoiser, their_denoiser, "atoms of proteins"),
    "input of the confidence head": (
        *("confidence_head.input_embedder", "szzz"),
        *(lambda m, s, z, r, b: m(s, z, r, b), lambda m, s, z, r, b: m(s, z, r, b), "pairs"),
    ),
    "pooling of rows": (
        *("confidence_head.row_attention_pooling", "z"),
        *(lambda m, z: m(z), lambda m, z: m(z, torch.ones(B, L, dtype=torch.bool)), "all"),
    ),
}


def kept(what: str) -> np.ndarray:
    """Return the mask of the elements of an output that count."""
    if what in KEPT:
        return KEPT[what]
    given = features()
    if what == "atoms of proteins":
        return np.repeat(given["atom_attention_mask"], 2, axis=0)
    mask = given["attention_mask"]
    return mask if what == "tokens of proteins" else mask[:, :, None] & mask[:, None]


@pytest.mark.parametrize("part", PARTS)
def test_part(models: Peers, part: str) -> None:
    """Compare its output, and the gradients of its inputs and weights."""
    path, kinds, call_ours, call_theirs, what = PARTS[part]
    draw = np.random.default_rng(1)
    shapes = dict(SHAPES)
    if part == "denoiser":
        shapes["x"] = (B, features()["ref_pos"].shape[1], 3)
    inputs = [draw.normal(size=shapes[kind]).astype(np.float32) for kind in kinds]
    mask, weight = kept(what), np.zeros(0)

    def torch_results(model: Any) -> dict[str, np.ndarray]:
        nonlocal weight
        module = copy.deepcopy(model.get_submodule(path))
        dtype = next(module.parameters()).dtype
        tensors = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in inputs]
        with torch.enable_grad():
            output = call_theirs(module, *tensors)
            if not weight.size:
                weight = draw.normal(size=output.shape).astype(np.float32)
                weight = weight * mask.reshape(*mask.shape, *[1] * (output.ndim - mask.ndim))
            (output * torch.tensor(weight, dtype=dtype)).sum().backward()
        named = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        found = {"output": output.detach() * torch.tensor(weight != 0)}
        found |= {f"input {i}": x.grad for i, x in enumerate(tensors)} | named
        return {name: x.numpy() for name, x in found.items()}

    theirs, float64 = torch_results(models.theirs), torch_results(models.float64)
    module = module_at(models.ours, path)
    # Weights of the other parts, whose gradient is not asked for, are not in `theirs`.
    before = module.parameters()

    def loss(parameters: Any, *arrays: mx.array) -> tuple[mx.array, mx.array]:
        module.update(parameters)
        output = call_ours(module, *arrays)
        return (output * mx.array(weight)).sum(), output

    arguments = list(range(len(inputs) + 1))
    (_, output), gradients = mx.value_and_grad(loss, arguments)(before, *map(mx.array, inputs))
    module.update(before)
    gradients = gradients if inputs else (gradients,)
    ours = {"output": output * mx.array(weight != 0)}
    ours |= {f"input {i}": gradient for i, gradient in enumerate(gradients[1:])}
    flat: Any = tree_flatten(gradients[0])
    ours |= dict(flat)
    assert theirs.keys() <= ours.keys()
    scale = max(np.abs(float64[name]).max() for name in float64 if name != "output")
    for name in theirs:
        # Gradients that vanish, such as those of a bias before a softmax, are compared with the others.
        least = 0.0 if name == "output" else 0.01 * scale
        hold_to_bar(np.array(ours[name]), theirs[name], float64[name], name, scale=least)


def test_outer_product_mean_of_many_rows(models: Peers) -> None:
    """More rows than channels: the outer products themselves."""
    module = models.ours.msa_encoder.layers[0].outer_product_mean
    theirs = models.theirs.msa_encoder.layers[0].outer_product_mean
    float64 = models.float64.msa_encoder.layers[0].outer_product_mean
    draw = np.random.default_rng(0)
    m, z = draw.normal(size=(B, L, 30, 18)).astype(np.float32), np.zeros((B, L, L, C), np.float32)
    mask = (draw.random((B, L, 30)) < 0.8).astype(np.float32)
    expected = [
        net(torch.tensor(m, dtype=dtype), torch.tensor(mask, dtype=dtype)).detach().numpy()
        for net, dtype in ((theirs, torch.float32), (float64, torch.float64))
    ]
    hold_to_bar(np.array(module(*map(mx.array, (m, mask, z)))), *expected)
