import random
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_esm_hf import MLXEsmForSequenceClassification, demo_model, set_seed


def draw():
    return random.random(), np.random.random(), mx.random.uniform().item()


def test_all_generators_are_seeded():
    set_seed(7)
    first = draw()
    assert draw() != first
    set_seed(7)
    assert draw() == first
    with pytest.raises(ValueError, match="seed must be an integer from 0 to 4294967295, got -1"):
        set_seed(-1)


def test_new_heads_repeat():
    heads = []
    for _ in range(2):
        set_seed(3)
        model = MLXEsmForSequenceClassification.from_pretrained(demo_model(), num_labels=3)
        heads.append([np.array(model.classifier.dense.weight), np.array(model.classifier.out_proj.weight)])
    assert np.array_equal(heads[0][0], heads[1][0]) and np.array_equal(heads[0][1], heads[1][1])


def test_torch_is_not_imported():
    code = "import sys, mlx_esm_hf; mlx_esm_hf.set_seed(1); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
