"""A tiny ESM-2 for the tests of the jobs."""

import pytest

from mlx_esm_hf import MLXAutoModelForMaskedLM, load_protein_model
from tests.jobs.models import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("esm2")))


@pytest.fixture(scope="module")
def loaded(folder):
    return load_protein_model(MLXAutoModelForMaskedLM, folder)
