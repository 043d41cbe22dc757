"""The open weights of ESMC in their original layout, converted, against its network in NumPy and transformers."""

import sys

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers

from conversion import esmc
from conversion.check import esmc as network
from conversion.esmc import BLOCKS, convert
from mlx_esm_hf import MLXAutoModelForMaskedLM, MLXEsmcForMaskedLM
from mlx_esm_hf.checkpoint.names import names_in
from mlx_esm_hf.errors import CheckpointError
from mlx_esm_hf.models.esmc.names import ORIGINAL, SEPARATED
from tests.parity import hold

PROTEIN = "MRAGRGGVPGSGGLRAPPPPLLXBZUO|AMLPAAAPR"


def original_weights(layers=3, D=128, F=80, dtype=torch.float32):
    """Random weights under the names, and in the order, of the `esm` package."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape, scale=0.1, mean=0.0):
        return (mean + scale * torch.randn(shape, generator=random)).to(dtype)

    state = {"embed.weight": normal(64, D, scale=1)}
    for layer in range(layers):
        attention, feed_forward = f"{BLOCKS}{layer}.attn", f"{BLOCKS}{layer}.ffn"
        state |= {
            f"{attention}.layernorm_qkv.0.weight": normal(D, mean=1),
            f"{attention}.layernorm_qkv.0.bias": normal(D),
            f"{attention}.layernorm_qkv.1.weight": normal(3 * D, D),
            f"{attention}.out_proj.weight": normal(D, D),
            f"{attention}.q_ln.weight": normal(D, mean=1),
            f"{attention}.k_ln.weight": normal(D, mean=1),
            f"{feed_forward}.0.weight": normal(D, mean=1),
            f"{feed_forward}.0.bias": normal(D),
            f"{feed_forward}.1.weight": normal(2 * F, D),
            f"{feed_forward}.3.weight": normal(D, F),
        }
    state["transformer.norm.weight"] = normal(D, mean=1)
    for part, rows in ((0, D), (3, 64)):
        state |= {f"sequence_head.{part}.weight": normal(rows, D), f"sequence_head.{part}.bias": normal(rows)}
    return state | {"sequence_head.2.weight": normal(D, mean=1), "sequence_head.2.bias": normal(D)}


def write(folder, state):
    torch.save(state, folder / "esmc.pth")
    return folder / "esmc.pth"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("esmc")
    convert(write(folder, original_weights()), folder / "converted")
    return folder / "converted"


def test_outputs(folder):
    """Ours and transformers' of the converted folder, against the network in float64."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is transformers.EsmcTokenizer
    ids = tokenizer(PROTEIN)["input_ids"]
    weights = {name: x.numpy().astype(np.float64) for name, x in original_weights().items()}
    exact = network(weights, np.array(ids))
    ours = MLXAutoModelForMaskedLM.from_pretrained(folder)([ids], output_hidden_states=True)
    model, info = transformers.EsmcForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        theirs = model(torch.tensor([ids]), output_hidden_states=True)
    hold("conversion/esmc.py", "logits", "ESMC", ours.logits[0], theirs.logits[0], exact["logits"])
    for layer, states in enumerate(zip(ours.hidden_states, theirs.hidden_states, strict=True)):
        found, expected = states
        hold("conversion/esmc.py", "hidden_states", "ESMC", found[0], expected[0], exact[f"layer {layer}"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_and_back(tmp_path, dtype):
    """The converted weights, put together again, are the original ones, bit for bit."""
    state = original_weights(dtype=dtype)
    model = convert(write(tmp_path, state), tmp_path / "converted")
    loaded = MLXEsmcForMaskedLM.from_pretrained(tmp_path / "converted", dtype=dtype)
    assert loaded.dtype == model.dtype
    parts = names_in(ORIGINAL, loaded.state_dict(), 3, "esmc")
    for layer in range(3):
        for ending, names in SEPARATED.items():
            rows = [parts.pop(f"layers.{layer}.{name}.weight") for name in names]
            parts[f"{BLOCKS}{layer}{ending}"] = mx.concatenate(rows)
    assert parts.keys() == state.keys()
    for name, x in state.items():
        assert mx.array_equal(parts[name].astype(mx.float32), mx.array(x.float().numpy())), name


def test_config(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    sizes = config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size
    assert type(config) is transformers.EsmcConfig and sizes == (128, 3, 2, 80)


BROKEN = {
    "no ESMC": (lambda state: state.pop("embed.weight"), "does not hold the weights of an ESMC"),
    "a width of no heads": (lambda state: state.update({"embed.weight": torch.zeros(64, 100)}), "is 100 wide"),
    "a lost array": (lambda state: state.pop("transformer.norm.weight"), "missing keys: esmc.norm.weight"),
    "another's": (lambda state: state.update(structure_head=torch.zeros(2)), "unexpected keys: structure_head"),
    "rows that cannot be split": (
        lambda state: state.update({f"{BLOCKS}1.ffn.1.weight": torch.zeros(81, 128)}),
        "has 81 rows, which are no 2 matrices",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(tmp_path, case):
    change, message = BROKEN[case]
    state = original_weights(layers=2)
    change(state)
    with pytest.raises(CheckpointError, match=message):
        convert(write(tmp_path, state), tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


class Hostile:
    def __reduce__(self):
        return print, ("hello",)


def test_nothing_is_executed(tmp_path, capsys):
    state = original_weights(layers=1) | {"more": Hostile()}
    with pytest.raises(CheckpointError, match="Nothing in the file was executed"):
        convert(write(tmp_path, state), tmp_path / "converted")
    assert "hello" not in capsys.readouterr().out


def test_command(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, original_weights(layers=1))
    monkeypatch.setattr(sys, "argv", ["esmc.py", str(path), str(tmp_path / "converted")])
    esmc.main()
    assert capsys.readouterr().out.endswith("parameters, float32\n")
    monkeypatch.setattr(sys, "argv", ["esmc.py", str(tmp_path / "none.pth"), str(tmp_path / "converted")])
    with pytest.raises(SystemExit, match="error: .*none.pth"):
        esmc.main()
