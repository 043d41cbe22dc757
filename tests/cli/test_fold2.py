"""`mlx-esm fold` with an ESMFold2 model, as a command, and under kill -9."""

import csv
import signal
import subprocess
import sys

import gemmi
import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from mlx_esm_hf import MLXEsmFold2Model
from mlx_esm_hf.cli import app
from mlx_esm_hf.models.esmfold2.modeling_esmfold2 import best_sample
from mlx_esm_hf.models.esmfold2.residues import decode_name
from tests.cli.test_fold import fasta, without_seconds  # noqa: F401 (a fixture)
from tests.jobs.models import UBIQUITIN, write_folding2_model, write_folding_model
from tests.processes import ENVIRONMENT

QUICK = ["--loops", "0", "--steps", "5"]
PROTEINS = ">a\nMKTAYI:GGWY\n>sp|P12345|B\nacdef*\n>c\nMK<mask>\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_folding2_model(tmp_path_factory.mktemp("fold2"))


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    return write_folding2_model(tmp_path_factory.mktemp("fast"), msa=False)


def run(*arguments):
    result = CliRunner().invoke(app, ["fold", *map(str, arguments)])
    return result.exit_code, result.output.replace("\n", " ")


def table(folder):
    with open(folder / "index.csv", newline="") as file:
        return list(csv.DictReader(file))


def atoms_of(chain):
    """Return {(residue, atom): (position, pLDDT)} of a chain that gemmi read."""
    return {(residue.seqid.num, atom.name): (atom.pos.tolist(), atom.b_iso) for residue in chain for atom in residue}


def test_a_folder_of_structures(model, tmp_path):
    """Gemmi reads back the chains, atoms and confidence of the best sample."""
    (tmp_path / "in.fasta").write_text(PROTEINS)
    output = tmp_path / "out"
    code, said = run(tmp_path / "in.fasta", "--model", model, "--output", output, "--pictures", "--samples", 3, *QUICK)
    assert code == 3 and "'c' has <mask>" in said
    endings = (".pdb", ".cif", ".npz", "_pae.json", "_pae.png", "_plddt.png")
    assert {f"{name}{end}" for name in ("a", "P12345") for end in endings} < {path.name for path in output.iterdir()}
    network = MLXEsmFold2Model.from_pretrained(model)
    rows = table(output)
    assert [row["id"] for row in rows] == ["a", "sp|P12345|B"]
    for row, sequence in zip(rows, ("MKTAYI:GGWY", "ACDEF"), strict=True):
        predicted = network.infer_protein(sequence, num_diffusion_samples=3, num_sampling_steps=5, num_loops=0)
        best = best_sample(predicted)
        assert (row["samples"], row["sample"], row["loops"], row["steps"], row["seed"]) == (
            *("3", str(best + 1), "0", "5", "0"),
        )
        assert row["iptm"] == f"{predicted.iptm[best].item():.3f}" and row["ptm"] == f"{predicted.ptm[best].item():.3f}"
        features = {name: np.array(array)[0] for name, array in network.features(sequence).items()}
        expected = {}
        for atom in np.flatnonzero(features["atom_attention_mask"]):
            token = features["atom_to_token"][atom]
            chain, residue = features["asym_id"][token], features["residue_index"][token] + 1
            key = "AB"[chain], (residue, decode_name(features["ref_atom_name_chars"][atom]))
            position = np.array(predicted.sample_atom_coords[best, atom])
            expected[key] = position, 100 * predicted.plddt_per_atom[best, atom].item()
        for ending, digits in ((".pdb", 3), (".cif", 3)):
            structure = gemmi.read_structure(str(output / f"{row['files']}{ending}"))
            found = {(chain.name, key): atom for chain in structure[0] for key, atom in atoms_of(chain).items()}
            assert found.keys() == expected.keys()
            for key, (position, plddt) in expected.items():
                np.testing.assert_allclose(found[key][0], position, atol=0.6 * 10**-digits)
                np.testing.assert_allclose(found[key][1], plddt, atol=0.006)


def test_names_of_the_model(model, tmp_path):
    (tmp_path / "in.fasta").write_text(">a\nMKTAYI\n")
    assert run(tmp_path / "in.fasta", "--model", model, "--output", tmp_path / "out.cif", *QUICK)[0] == 0
    text = (tmp_path / "out.cif").read_text()
    assert "ESMFold2 prediction for a" in text and "ESMFold2 in MLX" in text and "Science" not in text


def test_the_language_model_can_be_freed(model, tmp_path):
    (tmp_path / "in.fasta").write_text(PROTEINS)
    for name, options in (("kept", []), ("freed", ["--free-stem"])):
        assert run(tmp_path / "in.fasta", "--model", model, "--output", tmp_path / name, *QUICK, *options)[0] == 3
    for path in (tmp_path / "kept").glob("*.pdb"):
        assert path.read_bytes() == (tmp_path / "freed" / path.name).read_bytes()


def test_seeds(model, tmp_path):
    (tmp_path / "in.fasta").write_text(">a\nMKTAYI\n")
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        output = tmp_path / f"{name}.pdb"
        assert run(tmp_path / "in.fasta", "--model", model, "--output", output, "--seed", seed, *QUICK)[0] == 0
    one, again, two = ((tmp_path / f"{name}.pdb").read_text() for name in ("one", "again", "two"))
    assert one == again != two


def test_alignments(model, fast, tmp_path):
    """An alignment changes the structure of its protein only, and is checked before anything is folded."""
    (tmp_path / "in.fasta").write_text(">a\nMKTAYI:GGWY\n>b\nACDEF\n")
    msas = tmp_path / "msas"
    msas.mkdir()
    (msas / "a_1.a3m").write_text(">a\nMKTAYI\n>x key=1\nMRTaaAY-\n>y\nLKSAFI\n")
    for name, options in (("plain", []), ("aligned", ["--msa", msas])):
        code, said = run(tmp_path / "in.fasta", "--model", model, "--output", tmp_path / name, *QUICK, *options)
        assert code == 0, said
    same = {
        name: (tmp_path / "plain" / f"{name}.pdb").read_bytes() == (tmp_path / "aligned" / f"{name}.pdb").read_bytes()
        for name in "ab"
    }
    assert same == {"a": False, "b": True}

    def refused(*options, by=model):
        output = tmp_path / "refused"
        code, said = run(tmp_path / "in.fasta", "--model", by, "--output", output, *QUICK, *options)
        assert code == 1 and not list(output.glob("*.pdb")) and "Traceback" not in said
        return said

    assert "has no MSA encoder" in refused("--msa", msas, by=fast)
    assert "is not a folder" in refused("--msa", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "has no alignment for any protein" in refused("--msa", tmp_path / "empty")
    (msas / "b.a3m").write_text(">b\nACDEG\n")
    said = refused("--msa", msas)
    assert "'b'" in said and "b.a3m" in said and "residue 5" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-recycles", "1"], "num_recycles is not an option of ESMFold2 models; they have num_loops"),
        (["--samples", "0"], "--samples"),
        (["--steps", "0"], "--steps"),
        (["--seed", "-1"], "--seed"),
        (["--loops", "1.5"], "--loops"),
    ],
)
def test_user_errors(model, tmp_path, options, message):
    (tmp_path / "in.fasta").write_text(">a\nMKTAYI\n")
    code, said = run(tmp_path / "in.fasta", "--model", model, "--output", tmp_path / "out", *options)
    assert code in (1, 2) and message in said and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["in.fasta"]


def test_options_of_esmfold2_are_refused_for_esmfold(tmp_path):
    esmfold = write_folding_model(tmp_path / "esmfold")
    (tmp_path / "in.fasta").write_text(">a\nMKTAYI\n")
    for option in (["--loops", "1"], ["--samples", "2"], ["--seed", "1"], ["--free-stem"]):
        code, said = run(tmp_path / "in.fasta", "--model", esmfold, "--output", tmp_path / "out", *option)
        assert code == 1 and "is not an option of ESMFold models; they have num_recycles" in said


def test_killed_run_resumes_with_identical_files(fasta, model, tmp_path):  # noqa: F811
    """The files equal those of an uninterrupted run, except for seconds, their checksums, and the memory limit."""

    def arguments(output):
        return [str(x) for x in (fasta, "--model", model, "--output", output, "--batch-tokens", 64, *QUICK)]

    assert run(*arguments(tmp_path / "whole"))[0] == 0
    output = tmp_path / "out"
    command = [sys.executable, "-m", "tests.abuse.child", "fold", *arguments(output)]
    killed = subprocess.run(command, stderr=subprocess.DEVNULL, env=ENVIRONMENT | {"KILL_BEFORE": r".*/\.p6\.pdb\..*"})
    assert killed.returncode == -signal.SIGKILL
    assert 4 <= len(list(output.glob("p*.pdb"))) < 12
    kept = {path: path.read_bytes() for path in sorted(output.glob("shard-????????.safetensors"))[:-1]}
    assert run(*arguments(output))[0] == 0
    assert without_seconds(output) == without_seconds(tmp_path / "whole")
    assert kept and all(path.read_bytes() == data for path, data in kept.items())  # not folded again
    arrays = load_file(next(iter(kept)))
    assert any(name.endswith("/sample_ptm") for name in arrays)


def test_a_protein_does_not_depend_on_the_others(model, tmp_path):
    for name, text in (("alone", f">b\n{UBIQUITIN[:30]}\n"), ("both", f">a\nMKTAYI\n>b\n{UBIQUITIN[:30]}\n")):
        (tmp_path / "in.fasta").write_text(text)
        assert run(tmp_path / "in.fasta", "--model", model, "--output", tmp_path / name, *QUICK)[0] == 0
    assert (tmp_path / "alone" / "b.pdb").read_bytes() == (tmp_path / "both" / "b.pdb").read_bytes()
