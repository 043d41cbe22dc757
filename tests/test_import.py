"""Imports: what the package needs, and which modules may import which."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_esm_hf

PACKAGE = Path(mlx_esm_hf.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
ARCHITECTURE = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")


def python(script, *without):
    """Run a script in a process without these modules. Return its output, or its traceback."""
    hide = f"import sys\nfor name in {without!r}: sys.modules[name] = None\n"
    done = subprocess.run([sys.executable, "-c", hide + script], cwd=PACKAGE.parent, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else done.stderr


USE = """
import json, tempfile
import mlx.core as mx
import mlx_esm_hf

shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
tokens = dict(vocab_size=35, pad_token_id=1, mask_token_id=33, position_embedding_type="rotary")
model = mlx_esm_hf.MLXEsmForMaskedLM(mlx_esm_hf.MLXEsmConfig(**shape, **tokens)).eval()
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = mlx_esm_hf.MLXEsmForMaskedLM.from_pretrained(folder)
tokenizer = mlx_esm_hf.Esm1Tokenizer()
ids = tokenizer(["MKT", "MK<mask>"], return_tensors="mlx")["input_ids"]
assert mx.array_equal(model(ids).logits, loaded(ids).logits)
print(json.dumps(sorted(name.partition(".")[0] for name, module in sys.modules.items() if module)))
"""


def test_without_torch():
    """Tokenizing, running, saving and loading work without torch, and import no heavy optional module."""
    imported = json.loads(python(USE, "torch"))
    assert {"mlx", "mlx_esm_hf", "transformers"} <= set(imported)
    assert not {"torch", "matplotlib", "h5py", "pyarrow", "Bio", "pandas", "scipy", "typer", "rich"} & set(imported)


def test_without_a_backend():
    """On Linux, `pip install mlx` alone installs no backend, and `mlx.core` cannot be imported."""
    output = python("import mlx_esm_hf", "mlx.core")
    for part in ("ImportError: MLX has no backend", "pip install 'mlx-esm-hf[cpu]'", "cuda12", "cuda13", "On a Mac"):
        assert part in output


@pytest.mark.parametrize("source", SOURCES, ids=[str(path.relative_to(PACKAGE)) for path in SOURCES])
def test_no_source_imports_torch(source):
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert "torch" not in [name.partition(".")[0] for name in names], f"line {node.lineno}"


# The rows of the layer diagram: {folder or module of the package: number of its row, from the top}. A dotted name, such
# as "quantization.convert", is a module with a row of its own.
ROWS = {
    room.removesuffix("/*"): number
    for number, row in enumerate(ARCHITECTURE.split("## Layers")[1].split("```")[1].strip().splitlines())
    for room in row.split()
}
OUTSIDE = ("__init__", "__main__", "version")  # above all rows, and below them


def room_of(module):
    """Return the entry of the diagram that a module belongs to, such as "jobs" for "jobs.embed.embed"."""
    parts = module.split(".")
    dotted = ".".join(parts[:2])
    return dotted if dotted in ROWS else parts[0]


def imported_rooms(source):
    """Yield (line, room) for each import of the package's own modules in a source file."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        for module in modules:
            package, _, name = module.partition(".")
            if package == PACKAGE.name and name:
                yield node.lineno, room_of(name)


ROOMS = {path: room_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts)) for path in SOURCES}


@pytest.mark.parametrize(
    "source",
    [path for path in SOURCES if ROOMS[path] not in OUTSIDE],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_imports_point_down(source):
    """A module imports only from rows below its own, or from its own folder, not upward."""
    room = ROOMS[source]
    for line, other in imported_rooms(source):
        if other in (room, "version", "__version__"):
            continue
        beside = other.partition(".")[0] == room.partition(".")[0] and ROWS[other] == ROWS[room]
        assert beside or ROWS[other] > ROWS[room], f"line {line}: {room} imports {other}"


def test_the_architecture_page_shows_the_tree():
    tree = ARCHITECTURE.split("## The tree")[1].split("```")[1]
    shown = re.search(r"^mlx_esm_hf/\n((?:  .*\n)+)", tree, re.MULTILINE)[1]
    entries = {PACKAGE / name for name in re.findall(r"^  (\w\S*)", shown, re.MULTILINE)}
    there = {PACKAGE / path.relative_to(PACKAGE).parts[0] for path in SOURCES} - {PACKAGE / "version.py"}
    assert entries == there


def test_public_names():
    """The stub is the only list of public names: each is importable, and nothing else is."""
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    homes = {alias.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(mlx_esm_hf.__all__) == sorted(homes) == sorted(dir(mlx_esm_hf))
    for name, home in homes.items():
        assert getattr(mlx_esm_hf, name) is getattr(importlib.import_module(f"mlx_esm_hf.{home}"), name)
    with pytest.raises(AttributeError, match="EsmModel"):
        mlx_esm_hf.EsmModel  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'EsmModel'"):
        from mlx_esm_hf import EsmModel  # noqa: F401


MODULES = """
import pkgutil, mlx_esm_hf
for module in pkgutil.iter_modules(mlx_esm_hf.__path__):
    if module.name != "__main__":
        assert getattr(mlx_esm_hf, module.name).__name__ == f"mlx_esm_hf.{module.name}"
for package in (mlx_esm_hf.data, mlx_esm_hf.jobs, mlx_esm_hf.models, mlx_esm_hf.quantization, mlx_esm_hf.training):
    for module in pkgutil.iter_modules(package.__path__):
        assert getattr(package, module.name).__name__ == f"{package.__name__}.{module.name}"
print(mlx_esm_hf.training.trainer.MLXTrainer.__name__, sorted(dir(mlx_esm_hf)) == sorted(mlx_esm_hf.__all__))
"""


def test_modules_need_no_import_of_their_own():
    assert python(MODULES, "torch") == "MLXTrainer True\n"


@pytest.mark.parametrize(
    ("name", "meant"),
    [("MLXEsmForMaskedLm", "MLXEsmForMaskedLM"), ("EsmModel", "MLXEsmModel"), ("emded", "embed"), ("zzz", None)],
)
def test_a_misspelt_name_suggests_the_nearest(name, meant):
    with pytest.raises(AttributeError) as error:
        getattr(mlx_esm_hf, name)
    assert str(error.value).startswith(f"module 'mlx_esm_hf' has no attribute {name!r}.")
    assert str(error.value).endswith(f"Did you mean {meant!r}?" if meant else ".")


HEAVY = "print(sorted({'transformers', 'torch', 'numpy'} & {name for name, module in sys.modules.items() if module}))"


def test_import_does_not_import_heavy_modules():
    assert python(f"import mlx_esm_hf\n{HEAVY}") == "[]\n"


def test_jobs_import_torch_only_when_they_load_a_model():
    """So a wrong option or a missing file is reported at once."""
    names = ("embed", "score", "fill_mask", "contacts", "perplexity", "generate", "fold")
    script = "".join(f"import mlx_esm_hf.jobs.{name}\n" for name in names)
    assert python(f"{script}{HEAVY}") == "['numpy']\n"


@pytest.mark.parametrize("arguments", [["--help"], ["embed", "--help"]])
def test_help_imports_nothing_that_computes(arguments):
    script = f"""
from mlx_esm_hf.cli import app
app({arguments!r}, standalone_mode=False)
{HEAVY}
"""
    output = python(script)
    assert "proteins" in output and output.endswith("[]\n"), output
