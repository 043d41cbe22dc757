"""The README's section on publishing, typed line by line against a Hub on this machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_esm_hf
from tests.hub import Hub, Repository, environment, serve
from tests.jobs.models import write_model

ROOT = Path(mlx_esm_hf.__file__).parents[1]
BLOCK = re.compile(r"```(bash|python)\n(.*?)```", re.DOTALL)
BASE = "facebook/esm2_t12_35M_UR50D"
SHAPE = {"mlx_esm_hf": "(1, 22, 33)", "transformers": "torch.Size([1, 22, 33])"}  # a token for each residue, and two


def blocks(section):
    """[(language, code)] of a section of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return BLOCK.findall(text.partition(f"\n## {section}\n")[2].partition("\n## ")[0])


def library(code):
    return "mlx_esm_hf" if "mlx_esm_hf" in code else "transformers"


@pytest.fixture
def newcomer(tmp_path):
    """Someone with a folder "my-model", and a Hub where they have an account and Meta has the base model."""
    hub = Hub(users={"hf_me": "me"})
    hub.repos[BASE] = Repository()
    hub.repos[BASE].commit({"README.md": b"---\nlicense: mit\n---\n"}, "Card")
    write_model(tmp_path / "my-model")

    def type_in(program, code, home, **variables):
        """Give it to a program, in the folder where "my-model" is; `home` is a machine with its login and its cache."""
        machine = environment(endpoint, tmp_path / home, **variables)
        command = [*map(str, program), code]
        done = subprocess.run(command, cwd=tmp_path, env=machine, capture_output=True, text=True)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    type_in.hub = hub
    with serve(hub) as endpoint:
        yield type_in


def check(hub, printed):
    """What the commands say, and what the repository then holds."""
    assert "would go to me/my-model. Nothing was sent." in printed
    last, commit = printed.splitlines()[-1], hub.commit("me/my-model", "main")
    assert last.endswith(f"/me/my-model/commit/{commit}")
    files = hub.repos["me/my-model"].files()
    assert {"model.safetensors", "config.json", "vocab.txt"} <= set(files)
    assert f"base_model: {BASE}".encode() in files["README.md"] and b"license: mit" in files["README.md"]


def test_publish_what_you_made(newcomer):
    """Each block of Python on a machine that knows nothing of the folder."""
    (language, commands), *scripts = blocks("Publish what you made")
    assert language == "bash" and {library(code) for _, code in scripts} == set(SHAPE)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    check(newcomer.hub, newcomer(["bash", "-ec"], commands, "mine", PATH=path, PYTHONPATH=str(ROOT)))
    for number, (_, code) in enumerate(scripts):
        printed = newcomer([sys.executable, "-c"], code, f"other{number}", PYTHONPATH=str(ROOT))
        assert printed.strip() == SHAPE[library(code)]


@pytest.mark.long
def test_publish_from_and_to_fresh_environments(newcomer, tmp_path):
    """The same, this checkout and torch being installed into environments of their own."""
    wanted = {"mlx_esm_hf": [f"{ROOT}[cpu]"], "transformers": ["transformers", "torch==2.13.0"]}
    for name, packages in wanted.items():
        subprocess.run([sys.executable, "-m", "venv", tmp_path / name], check=True)
        subprocess.run([tmp_path / name / "bin" / "pip", "install", "-q", *packages], check=True)
    (_, commands), *scripts = blocks("Publish what you made")
    path = f"{tmp_path / 'mlx_esm_hf' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    check(newcomer.hub, newcomer(["bash", "-ec"], commands, "mine", PATH=path))
    for number, (_, code) in enumerate(scripts):
        printed = newcomer([tmp_path / library(code) / "bin" / "python", "-c"], code, f"other{number}")
        print(code, printed, sep="\n")
        assert printed.strip() == SHAPE[library(code)]
