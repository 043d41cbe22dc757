"""Each row of the tables of the migration guide: the code on the left and that on the right compute the same."""

import ast
import re
from pathlib import Path

import mlx.core as mx
import mlx.nn
import mlx.optimizers
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from mlx.utils import tree_flatten, tree_map
from torch.distributions import Categorical
from torch.optim.lr_scheduler import CosineAnnealingLR

import mlx_esm_hf
from tests.scripts import table
from tests.tiny import tiny
from tests.vocabulary import write_vocabulary

GUIDE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (.+?)\n(.*?)(?=^##)", GUIDE.partition("## Differences")[0] + "##", re.M | re.S))
IMPORTS, SCRIPTS = "Imports", "Twenty scripts { #scripts }"
RANDOM, MODULES = "Random numbers", "Modules and parameters"
CLASSIFIED = ("A training loop", "Fine-tuning with the Trainer", "PEFT")  # sections whose model is a classifier
TORCH_NAMES = (
    "get_linear_schedule_with_warmup",
    "get_cosine_schedule_with_warmup",
    "set_seed",
    "Trainer",
    "TrainingArguments",
)
TORCH_NAMES += ("LoraConfig", "PeftModel", "get_peft_model")


def rows_of(section):
    """Return the rows of a section's tables as the code of the first two cells, [(["code", ...], ["code", ...])]."""
    rows = []
    for line in SECTIONS[section].splitlines():
        if line.startswith("|") and not line.startswith("|---"):
            theirs, ours = line.strip("|").split(" | ")[:2]
            left, right = re.findall(r"`([^`]+)`", theirs), re.findall(r"`([^`]+)`", ours)
            rows.append((left, left if ours.strip() == "the same" else right))
    return rows[1:]


def test_names_exist():
    for theirs, ours in rows_of(IMPORTS):
        for name in theirs:
            assert hasattr(transformers, name), name
        for name in {*ours} - {"mlx_esm_hf", "EsmConfig"}:
            assert hasattr(mlx_esm_hf, name.removeprefix("mlx_esm_hf.")), name


# The two sides


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    for name, head in (("lm", "EsmForMaskedLM"), ("classifier", "EsmForSequenceClassification")):
        getattr(transformers, head)(transformers.EsmConfig(**tiny(**off))).save_pretrained(folder / name)
        transformers.EsmTokenizer(write_vocabulary(folder)).save_pretrained(folder / name)
    return folder


def names_of(checkpoint, head, tensors, array):
    """Return what has the same name on both sides: a model, its inputs, arrays and data."""
    random = np.random.default_rng(0)
    x, y, numbers = random.normal(size=(3, 3, 4)).astype(np.float32)
    model, tokenizer = head.from_pretrained(checkpoint), transformers.AutoTokenizer.from_pretrained(checkpoint)
    model.eval()
    inputs = tokenizer(["MKTAY<mask>AK", "LSDEDFKA"], return_tensors=tensors)
    return {
        "np": np,
        "DataCollatorWithPadding": transformers.DataCollatorWithPadding,
        "model": model,
        "module": model,
        "base": head.from_pretrained(checkpoint),
        "tokenizer": tokenizer,
        "inputs": inputs,
        "text": "MKTAYIAK",
        "loss_fn": lambda inputs: model(**inputs, labels=array([0, 1])).loss,
        "f": lambda x: (x**3).sum(),
        "x": array(x),
        "y": array(y),
        "mask": array(x > 0),
        "index": array([1, 0, 2]),
        "labels": array([1, -100, 3]),
        "ids": array([[0, 5, 32, 9, 32, 2], [0, 7, 6, 32, 4, 2]]),
        "weights": array([0.5, 1.0, 2.0, 4.0]),
        "table": numbers,
        "table_index": np.array([2, 0]),
        "total": 0.0,
        "loss": array(1.5),
        "rows": [{**tokenizer("MKTAYIAK"), "labels": 0}, {**tokenizer("LSDEDFKAVF"), "labels": 1}],
    }


def names_on_torch(checkpoint, task):
    names = names_of(checkpoint, getattr(transformers, f"Esm{task}"), "pt", torch.tensor)
    libraries = {"torch": torch, "F": F, "nn": torch.nn, "Categorical": Categorical}
    for module in (transformers, peft):
        libraries |= {name: getattr(module, name) for name in TORCH_NAMES if hasattr(module, name)}
    libraries |= {"CosineAnnealingLR": CosineAnnealingLR, "layer": names["model"].esm.encoder.layer[0], "caught": []}
    return names | libraries


def names_on_mlx(checkpoint, task):
    names = names_of(checkpoint, getattr(mlx_esm_hf, f"MLXEsm{task}"), "mlx", lambda value: mx.array(np.array(value)))
    libraries = {"mx": mx, "nn": mlx.nn, "optim": mlx.optimizers, "tree_flatten": tree_flatten, "tree_map": tree_map}
    return names | libraries | {name: getattr(mlx_esm_hf, name) for name in mlx_esm_hf.__all__}


# Running and comparing


def execute(code, names):
    """Run code in a namespace and return its value, or None, and the names that it assigns."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    before = dict(names)
    exec(compile(tree, code, "exec"), names)
    value = eval(compile(ast.Expression(last.value), code, "eval"), names) if last else None
    return value, {name for name in names if name not in before or names[name] is not before[name]} - {"__builtins__"}


def to_numpy(value):
    """Return an array or numbers as a NumPy array, the main numbers of an output, and None for anything else."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(x, (mx.array, torch.Tensor)) for x in value):
        parts = [to_numpy(x) for x in value]
        return np.concatenate([part.ravel() for part in parts])
    for field in ("logits", "predictions", "training_loss"):
        value = getattr(value, field, value)
    if isinstance(value, dict) and "eval_loss" in value:
        value = value["eval_loss"]
    if isinstance(value, torch.Tensor):
        return value.detach().float().numpy()
    if isinstance(value, mx.array):
        return np.array(value.astype(mx.float32))
    if isinstance(value, (bool, int, float, str, list, np.ndarray, np.number)):
        return np.array(value)
    return None


def hold_same(ours, theirs, code, only_shapes):
    our, their = to_numpy(ours), to_numpy(theirs)
    if our is None or their is None:
        return
    assert our.shape == their.shape, code
    if only_shapes:
        return
    if our.dtype.kind in "US":
        assert (our == their).all(), code
    else:
        np.testing.assert_allclose(our, their, rtol=2e-5, atol=2e-6, err_msg=code)


def trainable(names):
    """Return the number of trainable elements of the model."""
    model = names["model"]
    if isinstance(model, torch.nn.Module):
        return sum(p.numel() for p in model.parameters() if p.requires_grad)
    return sum(p.size for _, p in tree_flatten(model.trainable_parameters()))


def hold_same_steps(ours, theirs, code):
    """Take two steps with new optimizers and compare the weights that have gradients."""
    for _ in range(2):
        loss, grads = mlx.nn.value_and_grad(ours["model"], ours["loss_fn"])(ours["inputs"])
        ours["optimizer"].update(ours["model"], grads)
        theirs["optimizer"].zero_grad()
        theirs["loss_fn"](theirs["inputs"]).backward()
        theirs["optimizer"].step()
    weights = dict(tree_flatten(ours["model"].parameters()))
    for name, parameter in theirs["model"].named_parameters():
        if parameter.grad is not None:
            np.testing.assert_allclose(
                np.array(weights[name]), parameter.detach().numpy(), rtol=1e-4, atol=1e-5, err_msg=f"{code} {name}"
            )


def hold_same_rates(ours, theirs, code):
    """Compare the learning rates of eight steps, relative to the first learning rate of the optimizer."""
    scheduler, schedule = theirs["scheduler"], ours["schedule"]
    for step in range(8):
        rate = scheduler.get_last_lr()[0] / scheduler.base_lrs[0]
        np.testing.assert_allclose(schedule(mx.array(step)).item() / 1e-3, rate, rtol=1e-5, atol=1e-6, err_msg=code)
        theirs["optimizer"].step()
        scheduler.step()
    for group in theirs["optimizer"].param_groups:
        group["lr"] = group["initial_lr"]


@pytest.mark.parametrize("section", [name for name in SECTIONS if name not in (IMPORTS, SCRIPTS) and rows_of(name)])
def test_rows_compute_the_same(section, checkpoints, tmp_path, monkeypatch):
    name, task = ("classifier", "ForSequenceClassification") if section in CLASSIFIED else ("lm", "ForMaskedLM")
    theirs, ours = names_on_torch(checkpoints / name, task), names_on_mlx(checkpoints / name, task)
    for side in ("torch", "mlx"):
        (tmp_path / side).mkdir()
    for left, right in rows_of(section):
        assert len(left) == len(right) >= 1, (left, right)
        for their_code, our_code in zip(left, right, strict=True):
            monkeypatch.chdir(tmp_path / "torch")
            their_value, their_names = execute(their_code, theirs)
            monkeypatch.chdir(tmp_path / "mlx")
            our_value, our_names = execute(our_code, ours)
            hold_same(our_value, their_value, our_code, section == RANDOM)
            for name in our_names & their_names:
                hold_same(ours[name], theirs[name], our_code, False)
            if section == MODULES:
                assert trainable(ours) == trainable(theirs), our_code
            if "optimizer" in our_names:
                hold_same_steps(ours, theirs, our_code)
            if "schedule" in our_names:
                hold_same_rates(ours, theirs, our_code)


def test_a_module_in_the_place_of_a_layer_changes_what_it_computes(checkpoints):
    theirs = names_on_torch(checkpoints / "lm", "ForMaskedLM")
    ours = names_on_mlx(checkpoints / "lm", "ForMaskedLM")

    class Doubled(mlx.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def __call__(self, *args):
            states, *rest = self.layer(*args)
            return 2 * states, *rest

    before = ours["model"](**ours["inputs"])
    ours["model"].esm.encoder.layer[0] = Doubled(ours["model"].esm.encoder.layer[0])
    theirs["layer"].register_forward_hook(lambda module, args, output: 2 * output)
    after = ours["model"](**ours["inputs"])
    hold_same(after, theirs["model"](**theirs["inputs"]), "2 * states", False)
    assert mx.abs(after.logits - before.logits).max().item() > 0.1


def test_the_best_model_is_loaded_in_full(checkpoints, tmp_path):
    """MLXTrainer restores every weight of the best checkpoint; transformers 5.24 does not restore ESM's layer norms."""
    settings = {"num_train_epochs": 3, "learning_rate": 0.05, "eval_strategy": "epoch", "save_strategy": "epoch"}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "score", "report_to": "none"}
    for side, trainer, arguments, tensors in (
        (names_on_torch, transformers.Trainer, transformers.TrainingArguments, "pt"),
        (names_on_mlx, mlx_esm_hf.MLXTrainer, mlx_esm_hf.MLXTrainingArguments, "np"),
    ):
        names, scores = side(checkpoints / "classifier", "ForSequenceClassification"), iter((3.0, 2.0, 1.0))
        training = trainer(
            names["model"],
            arguments(str(tmp_path / side.__name__), **settings),
            train_dataset=names["rows"],
            eval_dataset=names["rows"],
            data_collator=transformers.DataCollatorWithPadding(names["tokenizer"], return_tensors=tensors),
            compute_metrics=lambda _, scores=scores: {"score": next(scores)},
        )
        training.train()
        best = type(names["model"]).from_pretrained(tmp_path / side.__name__ / "checkpoint-1").state_dict()
        loaded = names["model"].state_dict()
        wrong = {name for name in best if not np.allclose(to_numpy(loaded[name]), to_numpy(best[name]))}
        assert all("LayerNorm" in name for name in wrong)
        assert bool(wrong) == (trainer is transformers.Trainer)


def test_errors_that_the_guide_names():
    x = mx.ones((3, 4))
    with pytest.raises(ValueError, match="Cannot index mlx array using the given type"):
        x[np.array([0, 1])]
    for reads_a_value in (lambda x: x.sum().item(), print, np.array, lambda x: x if x.sum() > 0 else -x):
        assert "Attempting to eval an array during function transformations" in GUIDE
        with pytest.raises(ValueError, match="Attempting to eval an array during function transformations"):
            mx.compile(reads_a_value)(x)


def test_the_table_of_scripts_is_the_printed_one():
    assert table() in SECTIONS[SCRIPTS]
