"""Only `ops` and `runtime` depend on the device."""

import re
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_esm_hf
from mlx_esm_hf.runtime.device import device_name, half_precision_is_slow, use_device

PACKAGE = Path(mlx_esm_hf.__file__).parent
DEVICE = re.compile(r"default_device|device_info|is_available|mx\.[cg]pu\b|mx\.Device\(")
# Files that show the device to the user, and decide nothing by it.
REPORTS = {"cli/env.py", "modeling_utils.py", "training/arguments.py"}


def test_device_decisions_are_in_ops_and_runtime():
    sources = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in ("ops", "runtime")]
    found = {str(path.relative_to(PACKAGE)) for path in sources if DEVICE.search(path.read_text(encoding="utf-8"))}
    assert found == REPORTS


def test_use_device():
    before = mx.default_device()
    try:
        use_device(None)
        assert mx.default_device() == before
        use_device("cpu")
        assert mx.default_device() == mx.cpu and device_name() == "cpu" and half_precision_is_slow()
        with pytest.raises(ValueError, match="device must be one of cpu, gpu, got 'cuda'"):
            use_device("cuda")
    finally:
        mx.set_default_device(before)
