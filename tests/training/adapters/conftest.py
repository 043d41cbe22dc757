import pytest

from mlx_esm_hf.training.adapters import LoraConfig, save_adapter
from tests.parity import one_thread
from tests.training.adapters.helpers import our_base_with


@pytest.fixture(autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture
def saved(tmp_path):
    """The folder of an adapter for `our_base(tmp_path / "base", "lm")`."""
    save_adapter(our_base_with(tmp_path, LoraConfig(r=4)), tmp_path / "adapter")
    return tmp_path / "adapter"
