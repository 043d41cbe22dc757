"""Each script prints the same numbers on MLX as its original on torch."""

import re
import runpy
from decimal import Decimal

import pytest

from tests.scripts import FOLDER, NAMES
from tests.scripts.material import write_material

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    write_material(folder)
    return folder


def run(side, name, material, folder, monkeypatch):
    """Run a script in a folder with the checkpoints and tables, and return the words that it prints.

    What libraries print is not among them.
    """
    folder.mkdir()
    for path in material.iterdir():
        (folder / path.name).symlink_to(path)
    monkeypatch.chdir(folder)
    script, printed = FOLDER / side / f"{name}.py", []
    monkeypatch.setattr("sys.argv", [str(script)])
    runpy.run_path(str(script), {"print": lambda *words: printed.append(" ".join(map(str, words)))}, "__main__")
    return "\n".join(printed)


def hold_same(ours, theirs):
    """Raise AssertionError unless the texts agree, and their numbers to one unit of the last digit."""
    assert re.sub(r"\s+", " ", NUMBER.sub("#", ours)) == re.sub(r"\s+", " ", NUMBER.sub("#", theirs))
    for our, their in zip(NUMBER.findall(ours), NUMBER.findall(theirs), strict=True):
        a, b = Decimal(our), Decimal(their)
        digits = max(0, -a.as_tuple().exponent, -b.as_tuple().exponent)
        assert abs(a - b) <= (Decimal(1).scaleb(-digits) if digits else 0), f"{our} {their}\n{ours}\n{theirs}"


@pytest.mark.parametrize("name", NAMES)
def test_a_port_prints_what_its_original_prints(name, material, tmp_path, monkeypatch):
    theirs = run("on_torch", name, material, tmp_path / "torch", monkeypatch)
    ours = run("on_mlx", name, material, tmp_path / "mlx", monkeypatch)
    hold_same(ours, theirs)
    assert len(set(NUMBER.findall(theirs))) >= 8
