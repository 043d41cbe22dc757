"""The README and the documentation: what they tell users to type works, and what they link to exists."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import mlx_esm_hf
from mlx_esm_hf.cli import app
from tests.hub import Hub, Repository, environment, serve
from tests.jobs.models import write_model

ROOT = Path(mlx_esm_hf.__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"```(bash|python)\n(.*?)```", re.DOTALL)
BASE = "facebook/esm2_t12_35M_UR50D"
SHAPE = {"mlx_esm_hf": "(1, 22, 33)", "transformers": "torch.Size([1, 22, 33])"}  # one token per residue, and two more

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page):
    """Return [(language, code)] of a page."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


# What the pages say


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 180


def test_readme_links_to_files_that_exist():
    """Mkdocs checks the links of the pages; nothing else checks those of the README."""
    text = README.read_text(encoding="utf-8")
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text)):
        if target.startswith("https:"):
            continue
        assert (ROOT / target).exists(), target
        if anchor:
            page = (ROOT / target).read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
            slugs = {re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings}
            assert anchor in slugs or f"{{ #{anchor} }}" in page, f"{target}#{anchor}"


@every_page
def test_python_blocks_import_public_names(page):
    """Each block is valid Python, and what it imports from the package exists."""
    for language, code in blocks(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module == "mlx_esm_hf":
                assert {alias.name for alias in node.names} <= set(mlx_esm_hf.__all__), code


COMMANDS = typer.main.get_command(app).commands


@every_page
def test_commands_have_the_options_they_are_given(page):
    for language, code in blocks(page):
        lines = code.replace("\\\n", " ").splitlines() if language == "bash" else []
        for part in [part for line in lines for part in line.split("&&")]:
            words = shlex.split(part, comments=True)
            names = [Path(word).name for word in words]
            if "mlx-esm" not in names or names.index("mlx-esm") + 1 == len(words):
                continue
            command, *arguments = words[names.index("mlx-esm") + 1 :]
            known = {option for parameter in COMMANDS[command].params for option in parameter.opts}
            assert {argument for argument in arguments if argument.startswith("--")} <= known, part


def demo_blocks():
    """Return the blocks of Python that need nothing but the demo model."""
    return [
        pytest.param(code, id=str(page.relative_to(ROOT)))
        for page in PAGES
        for language, code in blocks(page)
        if language == "python" and "demo_model()" in code
    ]


@pytest.mark.parametrize("code", demo_blocks())
def test_blocks_with_the_demo_model_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "<block>", "exec"), {})


def test_speeds_are_measured():
    """Each ratio in the README and on the performance page is one of RESULTS.md."""
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    for page in (README, ROOT / "docs" / "performance.md"):
        ratios = re.findall(r"\| (\d\.\d\d) \|", page.read_text(encoding="utf-8"))
        assert len(ratios) >= 5
        for ratio in ratios:
            assert f"| {ratio} |" in results, f"{page.name}: {ratio}"


# Publishing, typed line by line against a Hub on this machine


def library(code):
    return "mlx_esm_hf" if "mlx_esm_hf" in code else "transformers"


def publishing_blocks():
    """Return the commands of the section, and its two scripts."""
    text = (ROOT / "docs" / "publishing.md").read_text(encoding="utf-8")
    section = text.partition("\n## Publish a folder\n")[2].partition("\n## ")[0]
    (language, commands), *scripts = BLOCK.findall(section)
    assert language == "bash" and {library(code) for _, code in scripts} == set(SHAPE)
    return commands, [code for _, code in scripts]


@pytest.fixture
def newcomer(tmp_path):
    """Yield a function that types commands as a user with a folder "my-model" and an account on a loopback Hub.

    The Hub has the base model.
    """
    hub = Hub(users={"hf_me": "me"})
    hub.repos[BASE] = Repository()
    hub.repos[BASE].commit({"README.md": b"---\nlicense: mit\n---\n"}, "Card")
    write_model(tmp_path / "my-model")

    def type_in(program, code, home, **variables):
        """Pass code to a program, in the folder with "my-model"; `home` is a machine with its login and its cache."""
        machine = environment(endpoint, tmp_path / home, **variables)
        command = [*map(str, program), code]
        done = subprocess.run(command, cwd=tmp_path, env=machine, capture_output=True, text=True)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    type_in.hub = hub
    with serve(hub) as endpoint:
        yield type_in


def check(hub, printed):
    """Check what the commands print, and what the repository then holds."""
    assert "would be uploaded to me/my-model. Nothing was uploaded." in printed
    last, commit = printed.splitlines()[-1], hub.commit("me/my-model", "main")
    assert last.endswith(f"/me/my-model/commit/{commit}")
    files = hub.repos["me/my-model"].files()
    assert {"model.safetensors", "config.json", "vocab.txt"} <= set(files)
    assert f"base_model: {BASE}".encode() in files["README.md"] and b"license: mit" in files["README.md"]


def test_publish_a_folder(newcomer):
    """Each block of Python runs on a machine that does not have the folder."""
    commands, scripts = publishing_blocks()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    check(newcomer.hub, newcomer(["bash", "-ec"], commands, "mine", PATH=path, PYTHONPATH=str(ROOT)))
    for number, code in enumerate(scripts):
        printed = newcomer([sys.executable, "-c"], code, f"other{number}", PYTHONPATH=str(ROOT))
        assert printed.strip() == SHAPE[library(code)]


@pytest.mark.long
def test_publish_from_and_to_fresh_environments(newcomer, tmp_path):
    """The same, with this checkout and torch installed into environments of their own."""
    wanted = {"mlx_esm_hf": [f"{ROOT}[cpu]"], "transformers": ["transformers", "torch==2.13.0"]}
    for name, packages in wanted.items():
        subprocess.run([sys.executable, "-m", "venv", tmp_path / name], check=True)
        subprocess.run([tmp_path / name / "bin" / "pip", "install", "-q", *packages], check=True)
    commands, scripts = publishing_blocks()
    path = f"{tmp_path / 'mlx_esm_hf' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    check(newcomer.hub, newcomer(["bash", "-ec"], commands, "mine", PATH=path))
    for number, code in enumerate(scripts):
        printed = newcomer([tmp_path / library(code) / "bin" / "python", "-c"], code, f"other{number}")
        print(code, printed, sep="\n")
        assert printed.strip() == SHAPE[library(code)]
