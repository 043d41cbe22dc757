import numpy as np
import pytest
import transformers

from mlx_esm_hf import MLXEsmForMaskedLM
from mlx_esm_hf.pipelines import pipeline
from tests.pipelines.models import UBIQUITIN, write_model

ONE, TWO = "MQIF<mask>KTLTGKTITLEVEPSDTIENVK", "MQ<mask>FVKTL<mask>GKT"


@pytest.fixture(scope="module", params=["ESM-2", "ESM-1b"])
def folder(request, tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp(request.param), request.param))


def assert_same(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=1e-5)
    else:
        assert ours == theirs


@pytest.mark.parametrize("inputs", [ONE, TWO, [ONE], [TWO], [ONE, TWO], [ONE, ONE]], ids=repr)
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"targets": ["A", "W", "L"]}, {"targets": "K"}], ids=repr)
def test_fill_mask_is_transformers(folder, inputs, options):
    theirs = transformers.pipeline("fill-mask", model=folder)
    assert_same(pipeline("fill-mask", model=folder)(inputs, **options), theirs(inputs, **options))


@pytest.mark.parametrize("inputs", [UBIQUITIN, ["MKT"], ["MKT", "ACDEF"]])
def test_feature_extraction_is_transformers(folder, inputs):
    theirs = transformers.pipeline("feature-extraction", model=folder)(inputs)
    ours = pipeline("feature-extraction", model=folder)(inputs)

    def check(a, b):
        assert len(a) == len(b)
        if isinstance(b[0][0], float):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
        else:
            for x, y in zip(a, b, strict=True):
                check(x, y)

    check(ours, theirs)


def test_options(folder):
    model = MLXEsmForMaskedLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert_same(pipeline("fill-mask", model, tokenizer)(ONE), pipeline("fill-mask", folder)(ONE))
    with pytest.raises(ValueError, match="needs its tokenizer"):
        pipeline("fill-mask", model)
    with pytest.raises(KeyError, match="Unknown task fold"):
        pipeline("fold", folder)
    with pytest.raises(ValueError, match="No mask_token"):
        pipeline("fill-mask", folder)("MKT")
    theirs = transformers.pipeline("fill-mask", model=folder)(ONE, targets=["JJ", "A"])
    with pytest.warns(UserWarning, match="'JJ' is not in the vocabulary"):
        assert_same(pipeline("fill-mask", folder)(ONE, targets=["JJ", "A"]), theirs)
    features = pipeline("feature-extraction", folder)("MKT", return_tensors=True)
    assert features.shape == (1, 5, 32)
