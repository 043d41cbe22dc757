"""ESMFold of fair-esm, converted: the bits of the model that it was made from, here and in torch's transformers."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, EsmConfig, EsmForProteinFolding, EsmTokenizer

from conversion.fair_esmfold import VOCABULARY, convert, main
from mlx_esm_hf import MLXEsmForProteinFolding
from mlx_esm_hf.checkpoint.names import names_in
from mlx_esm_hf.checkpoint.torch_bin import load_torch_checkpoint, omegaconf_values
from mlx_esm_hf.errors import CheckpointError
from mlx_esm_hf.models.esm.names import FAIR_ESM
from tests.checkpoints import heard
from tests.conversion.checkpoints import build, save
from tests.models.esmfold.folding import perturb, residues
from tests.tiny import tiny_folding

ROOT = Path(__file__).parents[2]
LAYERS, HIDDEN, HEADS = 3, 40, 4

# The settings of `tiny_folding`, under fair-esm's names, as omegaconf 2.4 pickles them:
# pickle.dumps({"model": OmegaConf.create({"model": …}).model}, 2)
CFG = Path(__file__).with_name("esmfold_cfg.pkl")


class StandIns(pickle.Unpickler):
    """Reads omegaconf's objects without omegaconf, into classes of the same names. They are pickled as they were."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] != "omegaconf":
            return super().find_class(module, name)
        if not hasattr(sys.modules[module], name):
            setattr(sys.modules[module], name, type(name, (), {"__module__": module}))
        return getattr(sys.modules[module], name)


@pytest.fixture(scope="module")
def cfg() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for module in ("", ".base", ".dictconfig", ".listconfig", ".nodes"):
            patch.setitem(sys.modules, f"omegaconf{module}", ModuleType(f"omegaconf{module}"))
        with CFG.open("rb") as file:
            yield StandIns(file).load()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model of transformers, and its folder. fair-esm's ESM-2 is four times as wide inside a layer."""
    model = perturb(EsmForProteinFolding(EsmConfig(**tiny_folding(fp16_esm=True) | {"intermediate_size": 4 * HIDDEN})))
    folder = tmp_path_factory.mktemp("original")
    model.eval().save_pretrained(folder)
    return model, folder


def save_stem(model: Any, path: Path, **options: Any) -> Path:
    """Its language model as fair-esm's ESM-2, with a head that folding has no use for."""
    stem = build("esm2_tiny", LAYERS, HIDDEN, HEADS)
    state = {name: x for name, x in model.state_dict().items() if name.startswith("esm.")}
    stem.to(state["esm.embeddings.word_embeddings.weight"].dtype)
    missing, unexpected = stem.load_state_dict(names_in(FAIR_ESM, state, LAYERS, "esm"), strict=False)
    assert {name.partition(".")[0] for name in missing} == {"lm_head"} and not unexpected
    return save(stem, path, **options)


def folding_part(model: Any) -> dict[str, torch.Tensor]:
    return {name: x for name, x in model.state_dict().items() if not name.startswith("esm.")}


def save_folding(state: dict[str, torch.Tensor], path: Path, cfg: Any, format: str = "zip") -> Path:
    torch.save({"cfg": cfg, "model": state}, path, _use_new_zipfile_serialization=format == "zip")
    return path


def hold_same(model: Any, folder: Path) -> None:
    """Every array of the folder, as transformers loads it, has the bits and the dtype of the model's."""
    back, info = EsmForProteinFolding.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    wanted, found = model.state_dict(), back.state_dict()
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize(("format", "points"), [("zip", "_points"), ("legacy", "_points"), ("zip", "_points.linear")])
def test_same_model(original: Any, cfg: Any, tmp_path: Path, format: str, points: str) -> None:
    """Weights, settings and outputs; also where OpenFold 2 named the projections to points."""
    model, folder = original
    state = {name.replace("_points.", f"{points}."): x for name, x in folding_part(model).items()}
    folding = save_folding(state, tmp_path / "esmfold_tiny.pt", cfg, format)
    convert(folding, save_stem(model, tmp_path / "esm2_tiny.pt", format=format), tmp_path / "converted")
    hold_same(model, tmp_path / "converted")
    with heard("mlx_esm_hf") as said:
        ours, known = (MLXEsmForProteinFolding.from_pretrained(path) for path in (tmp_path / "converted", folder))
    assert said == []
    settings = ours.config.esmfold_config.to_dict()
    assert settings.pop("esm_type") == "esm2_3B" and known.config.esmfold_config.to_dict().pop("esm_type") is None
    assert settings == {k: v for k, v in known.config.esmfold_config.to_dict().items() if k != "esm_type"}
    assert list(ours.config.vocab_list) == list(known.config.vocab_list)
    ids, mask, positions = residues([19, 7])
    for name, value in known(ids, mask, positions).items():
        assert mx.array_equal(value, ours(ids, mask, positions)[name]), name
    with torch.no_grad():
        inputs = [torch.tensor(x) for x in (ids, mask, positions)]
        theirs, back = (m(*inputs) for m in (model, EsmForProteinFolding.from_pretrained(tmp_path / "converted")))
    assert all(torch.equal(theirs[name], back[name]) for name in theirs)
    with safe_open(tmp_path / "converted" / "model.safetensors", "numpy") as file:
        dtypes = {name.startswith("esm."): set() for name in file.keys()}  # noqa: SIM118
        for name in file.keys():  # noqa: SIM118
            dtypes[name.startswith("esm.")].add(file.get_tensor(name).dtype.name)
    assert dtypes == {True: {"float16"}, False: {"float32", "int64"}}


def test_float32_language_model(original: Any, cfg: Any, tmp_path: Path) -> None:
    """Becomes float16, as fair-esm does."""
    wide = copy.deepcopy(original[0]).float()
    folding = save_folding(folding_part(wide), tmp_path / "esmfold_tiny.pt", cfg)
    convert(folding, save_stem(wide, tmp_path / "esm2_tiny.pt"), tmp_path / "converted")
    hold_same(original[0], tmp_path / "converted")


def test_language_model_in_the_folding_file(original: Any, cfg: Any, tmp_path: Path) -> None:
    """Counts, as fair-esm loads it last."""
    model = original[0]
    other = perturb(copy.deepcopy(model), seed=1)
    stem = names_in(FAIR_ESM, {n: x for n, x in model.state_dict().items() if n.startswith("esm.")}, LAYERS, "esm")
    state = folding_part(model) | {f"esm.{name}": x for name, x in stem.items()}
    folding = save_folding(state, tmp_path / "esmfold_tiny.pt", cfg)
    convert(folding, save_stem(other, tmp_path / "esm2_tiny.pt"), tmp_path / "converted")
    hold_same(model, tmp_path / "converted")


def test_tokenizer(original: Any, cfg: Any, tmp_path: Path) -> None:
    """That of facebook/esmfold_v1: residues, and padding that is an alanine."""
    model = original[0]
    folding = save_folding(folding_part(model), tmp_path / "esmfold_tiny.pt", cfg)
    convert(folding, save_stem(model, tmp_path / "esm2_tiny.pt"), tmp_path / "converted")
    with heard("transformers") as said:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert said == []
    assert tokenizer("ARNDCQEGHILKMFPSTWYVX", add_special_tokens=False)["input_ids"] == list(range(21))
    batch = tokenizer(["MKT", "G"], add_special_tokens=False, padding=True)
    assert batch["input_ids"] == [[12, 11, 16], [7, 0, 0]] and batch["attention_mask"] == [[1, 1, 1], [1, 0, 0]]
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<mask>", "<cls>", "<sep>", "<eos>"]) == [21, 22, 23, 24, 25]
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
    hub = EsmTokenizer(tmp_path / "vocab.txt")  # as transformers' conversion script makes it
    hub.pad_token_id = 0
    assert tokenizer("MKX") == hub("MKX") and tokenizer.special_tokens_map == hub.special_tokens_map


def test_settings_of_omegaconf(cfg: Any, tmp_path: Path) -> None:
    """The values of every kind, from a file that is read as data."""
    path = save_folding({}, tmp_path / "x.pt", cfg)
    settings = omegaconf_values(load_torch_checkpoint(path)[1]["cfg"]["model"])
    trunk = settings.pop("trunk")
    assert settings == {
        "_name": "esmfold",
        "esm_type": "esm2_3B",
        "use_esm_attn_map": False,
        "embed_aa": True,
        "lddt_head_hid_dim": 12,
        "notes": ["a list", 2],
    }
    assert trunk["chunk_size"] is None and trunk["structure_module"]["no_v_points"] == 5
    assert trunk["structure_module"]["epsilon"] == 1e-8


def test_no_regression_file(original: Any, cfg: Any, tmp_path: Path) -> None:
    """Folding has no use for a contact head: the structure is the same."""
    model, folder = original
    folding = save_folding(folding_part(model), tmp_path / "esmfold_tiny.pt", cfg)
    convert(folding, save_stem(model, tmp_path / "esm2_tiny.pt", regression=False), tmp_path / "converted")
    ours, info = MLXEsmForProteinFolding.from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert {name.rpartition(".")[0] for name in info["missing_keys"]} == {"esm.contact_head.regression"}
    known = MLXEsmForProteinFolding.from_pretrained(folder)
    assert mx.array_equal(ours.infer("MKTW").positions, known.infer("MKTW").positions)


# Other files


class TouchesFile:
    """Is pickled as a call that creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("format", ["zip", "legacy"])
def test_malicious_settings(original: Any, cfg: Any, tmp_path: Path, format: str) -> None:
    """A call deep inside a config of omegaconf."""
    marker, evil = tmp_path / "marker", copy.deepcopy(cfg)
    evil["model"]._content["trunk"]._content["max_recycles"]._val = TouchesFile(marker)
    folding = save_folding(folding_part(original[0]), tmp_path / "evil.pt", evil, format)
    with pytest.raises(CheckpointError, match=r"evil\.pt: it holds the global '.*system'.*Nothing in the file"):
        convert(folding, save_stem(original[0], tmp_path / "esm2_tiny.pt"), tmp_path / "converted")
    assert not marker.exists() and not (tmp_path / "converted").exists()


def changed(cfg: Any, **values: Any) -> Any:
    """The config with other values in its trunk."""
    cfg = copy.deepcopy(cfg)
    for name, value in values.items():
        cfg["model"]._content["trunk"]._content[name]._val = value
    return cfg


def within_itself(cfg: Any) -> Any:
    cfg = copy.deepcopy(cfg)
    cfg["model"]._content["trunk"] = cfg["model"]
    return cfg


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cfg: {}, "it lacks 'model'"),
        (lambda cfg: {"model": 3}, "not subscriptable"),
        (lambda cfg: {"model": {"trunk": {}}}, "it lacks 'structure_module'"),
        (lambda cfg: {"model": {"trunk": {"structure_module": 3}}}, "has no attribute 'items'"),
        (within_itself, "maximum recursion depth"),
        (lambda cfg: changed(cfg, num_blocks=10**9), r"those of 1000000000 trunk.blocks.\*, but its weights have 2"),
        (lambda cfg: changed(cfg, max_recycles="four"), "max_recycles"),
        (lambda cfg: changed(cfg, sequence_head_width=7), "sequence_head_width, got 64 != 9"),
    ],
)
def test_other_settings(original: Any, cfg: Any, tmp_path: Path, change: Any, message: str) -> None:
    folding = save_folding(folding_part(original[0]), tmp_path / "x.pt", change(cfg))
    with pytest.raises(CheckpointError, match=rf"x\.pt is no checkpoint of ESMFold: .*{message}"):
        convert(folding, save_stem(original[0], tmp_path / "esm2_tiny.pt"), tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_other_weights(original: Any, cfg: Any, tmp_path: Path) -> None:
    """A missing array, one that nothing reads, another width, and another language model."""
    state = folding_part(original[0])
    bias = "trunk.blocks.1.tri_att_end.mha.linear_o.bias"
    stem = save_stem(original[0], tmp_path / "esm2_tiny.pt")
    for wrong, message in (
        ({name: x for name, x in state.items() if name != bias}, f"missing keys: {bias}"),
        (state | {"more": torch.ones(1)}, "unexpected keys: more"),
        (state | {bias: torch.ones(3)}, rf"{bias}: \(3,\) in the checkpoint"),
        (state | {"esm.layers.0.fc1.bias": torch.ones(3)}, r"intermediate.dense.bias: \(3,\) in the checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=rf"x\.pt, with the language model .*esm2_tiny\.pt(.|\n)*{message}"):
            convert(save_folding(wrong, tmp_path / "x.pt", cfg), stem, tmp_path / "converted")
    folding = save_folding(state, tmp_path / "x.pt", cfg)
    other = save(build("esm2_other", 2, HIDDEN, HEADS), tmp_path / "esm2_other.pt")
    with pytest.raises(CheckpointError, match=r"esm_s_combine: \(4,\) in the checkpoint"):
        convert(folding, other, tmp_path / "converted")
    with pytest.raises(CheckpointError, match=r"x\.pt is no checkpoint of ESM-1, ESM-1b"):
        convert(folding, folding, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_script(original: Any, cfg: Any, tmp_path: Path) -> None:
    """As it is typed, without torch and omegaconf."""
    model = original[0]
    folding = save_folding(folding_part(model), tmp_path / "esmfold_tiny.pt", cfg)
    stem = save_stem(model, tmp_path / "esm2_tiny.pt")
    without_torch = (
        "import runpy, sys\n"
        "sys.modules['torch'] = sys.modules['omegaconf'] = None\n"
        "runpy.run_module('conversion.fair_esmfold', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", without_torch, folding, stem, tmp_path / "converted"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'converted'}: {count:,} parameters\n"
    hold_same(model, tmp_path / "converted")


def test_script_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["fair_esmfold.py", str(tmp_path / "none.pt"), "x.pt", str(tmp_path / "converted")]
    )
    with pytest.raises(SystemExit, match=r"error: .*none\.pt"):
        main()
