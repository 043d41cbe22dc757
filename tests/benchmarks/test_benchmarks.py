"""The command `python -m benchmarks` on models of a few layers."""

import json
import subprocess
import sys

import pytest

from benchmarks.peers import cores
from mlx_esm_hf.ops import kernels

CASES = {
    "bulk": ["3 proteins"],
    "uniform": ["4 x 512 tokens"],
    "single": ["64 residues", "256 residues", "1022 residues"],
    "contacts": ["256 residues"],
    "fold": ["16 residues", "16 residues, peak memory"],
    "fold2": [
        "16 tokens, trunk",
        "16 tokens, 4 samples, denoiser",
    ],
    "fold2-memory": ["16 tokens, trunk", "16 tokens, denoiser"],
    "encoder": ["4 x 512 tokens"],
    "gemm": [
        f"{tokens} x {layer}" for layer in ("32 x 32", "32 x 128", "128 x 32") for tokens in (16, 64, 256, 1024, 2048)
    ],
    "quantized": ["3 proteins", "weights", "peak memory", "64 residues"],
    "training": [
        "8 x 256 tokens",
        "3 proteins as they arrive, 4 a batch",
        "8 x 256 tokens, peak memory",
        "3 proteins as they arrive, 4 a batch, peak memory",
    ],
    "lora": ["4 x 256 tokens", "4 x 256 tokens, peak memory"],
    "loading": ["and 8 tokens"],
    "memory": ["bulk, 3 proteins"],
}
TARGETS = {"bulk": 2, "uniform": 1, "single": 1, "training": 4, "encoder": 1, "quantized": 2, "memory": 1}
SMALLER_IS_BETTER = {"ms": True, "s": True, "residues/s": False, "GFLOP/s": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The output of the command and the files it writes."""
    folder = tmp_path_factory.mktemp("benchmarks")
    options = [
        "--models=tiny,tiny ESMFold,tiny ESMFold2",
        "--proteins=3",
        "--repeats=1",
        "--at-least=0",
        "--budget=1000",
    ]
    command = [sys.executable, "-m", "benchmarks", *options, "--json", folder / "a.json", "--markdown", folder / "a.md"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "a.json").read_text()), (folder / "a.md").read_text(encoding="utf-8")


@pytest.mark.long
def test_every_peer_is_measured_in_every_workload(run):
    printed, data, markdown = run
    rows = {(row["workload"], row["case"], row["peer"]): row for row in data["results"]}
    for workload, cases in CASES.items():
        for case in cases:
            peers = [peer for w, c, peer in rows if (w, c) == (workload, case)]
            assert peers[0] == "ours" and len(peers) > 1, (workload, case)
            for text in (printed, markdown) if workload != "gemm" else ():
                model = {"fold": "tiny ESMFold", "fold2": "tiny ESMFold2", "fold2-memory": "tiny ESMFold2"}.get(
                    workload, "tiny"
                )
                assert f"{workload} {model}, {case}" in text
    assert {"transformers sdpa, as they arrive", "transformers eager, by length", "ours, kernels off"} <= {
        peer for _, _, peer in rows
    }
    assert data["machine"]["cores"] == len(cores())
    assert data["machine"]["peers"]["ours"]["kernels"] == kernels.STATE
    assert [row for row in data["results"] if "figure" not in row and row["peer"] != "esm-cpp"] == []


@pytest.mark.long
def test_ratios_are_computed_from_the_figures(run):
    rows = [row for row in run[1]["results"] if "figure" in row]
    ours = {(row["workload"], row["case"]): row["figure"]["median"] for row in rows if row["peer"] == "ours"}
    for row in (row for row in rows if row["peer"] != "ours"):
        ratio = ours[row["workload"], row["case"]] / row["figure"]["median"]
        if SMALLER_IS_BETTER.get(row["unit"]):
            ratio = 1 / ratio
        assert row["ratio"]["median"] == pytest.approx(ratio), row


@pytest.mark.long
def test_results_are_compared(run):
    """The results of peers are compared with ours in each workload that has results."""
    deviations = {}
    for row in run[1]["results"]:
        if row["peer"] != "ours" and "figure" in row:
            deviations.setdefault(row["workload"], []).append(row["deviation"])
    assert set(deviations.pop("encoder")) == {None}
    assert deviations.keys() >= CASES.keys() - {"encoder"}
    products, rounded = ([d for d in deviations.pop(name) if d is not None] for name in ("gemm", "quantized"))
    assert len(products) == 2 * len(CASES["gemm"]) and max(products) < 1e-5
    assert len(rounded) == 2 * 8 and 1e-3 < max(rounded) < 0.2
    assert max(sum(deviations.values(), [])) <= 1e-3


@pytest.mark.long
def test_products_are_compared_with_the_peak(run):
    """The table has a line for each product, with each peer's best as a fraction of the FMA loop's best."""
    printed, data, markdown = run
    rows = [row for row in data["results"] if row["workload"] == "gemm"]
    assert {row["peer"] for row in rows} == {"ours", "torch", "OpenBLAS under MLX", "FMA loop"}
    peak = max(row["figure"]["max"] for row in rows if row["peer"] == "FMA loop")
    assert f"the FMA loop's best, {peak:.0f}" in markdown and "Matrix products in GFLOP/s" in printed
    for case in CASES["gemm"]:
        values = [row["figure"] for row in rows if row["case"] == case]
        cells = (f"{v['median']:.0f}, {v['max']:.0f}, {v['max'] / peak:.0%}" for v in values)
        assert f"| tiny | {case} | {' | '.join(cells)} |" in markdown


@pytest.mark.long
def test_the_table_of_precisions(run):
    """The table has a line for each precision with the figures of all its cases."""
    _, data, markdown = run
    figures = {
        (row["case"], row["peer"]): row["figure"]["median"] for row in data["results"] if row["workload"] == "quantized"
    }
    base = figures["3 proteins", "transformers sdpa, one at a time"]
    for peer in ("ours, 8 bits, int8", "ours, 4 bits", "torch's dynamic int8"):
        speed = figures["3 proteins", peer]
        assert f"| tiny | {peer} | {speed:,.0f} | {speed / base:.2f} |" in markdown
    sizes = [figures["weights", peer] for peer in ("ours", "ours, bfloat16", "ours, 8 bits, int8", "ours, 4 bits")]
    assert sizes == sorted(sizes, reverse=True) and sizes[1] == sizes[0] / 2
    assert min(value for (case, _), value in figures.items() if case == "peak memory") > 0.1


@pytest.mark.long
def test_targets_have_verdicts(run):
    printed, data, markdown = run
    for workload, count in TARGETS.items():
        rows = [row for row in data["targets"] if row["workload"] == workload]
        assert len(rows) == count
        for row in rows:
            bound = float(row["target"].split()[1])
            reached = row["ratio"]["median"] <= bound if "≤" in row["target"] else row["ratio"]["median"] >= bound
            assert row["verdict"] == ("pass" if reached else "short")
            assert row["verdict"] in printed and f"| {row['target']} | {row['verdict']} |" in markdown


def test_esmc_is_compared_with_transformers(tmp_path):
    options = [
        "--models=tiny-ESMC",
        "--workloads=uniform",
        "--repeats=1",
        "--at-least=0",
        "--json",
        tmp_path / "a.json",
    ]
    done = subprocess.run([sys.executable, "-m", "benchmarks", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "a.json").read_text())["results"]
    peers = ["ours", "transformers sdpa", "transformers eager", "ours, kernels off"]
    assert [row["peer"] for row in rows] == peers and all("figure" in row for row in rows)
    assert max(row["deviation"] for row in rows[1:]) <= 1e-3
