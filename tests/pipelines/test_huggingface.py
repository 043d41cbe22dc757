import shutil

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers

from mlx_esm_hf import MLXEsmForMaskedLM
from mlx_esm_hf.pipelines import pipeline
from tests.hub import Hub, serve, use
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
    elif isinstance(theirs, (float, np.floating)):
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


LABELS = {
    "exclusive": {"id2label": {0: "helix", 1: "B-sheet", 2: "I-sheet", 3: "O"}},
    "not exclusive": {"id2label": {0: "a", 1: "b"}, "problem_type": "multi_label_classification"},
    "regression": {"num_labels": 1, "problem_type": "regression"},
    "one": {"num_labels": 1},
}


@pytest.fixture(scope="module", params=LABELS)
def classifiers(request, folder, tmp_path_factory):
    """{task: folder} of classifiers that transformers made of the model."""
    folders = {}
    for task, name in (("text", "EsmForSequenceClassification"), ("token", "EsmForTokenClassification")):
        torch.manual_seed(0)
        settings = LABELS[request.param] | {"initializer_range": 1.0}
        model = getattr(transformers, name).from_pretrained(folder, **settings)
        folders[task] = str(tmp_path_factory.mktemp(task))
        model.save_pretrained(folders[task])
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folders[task])
    return folders


@pytest.mark.parametrize("inputs", [UBIQUITIN, [UBIQUITIN], [UBIQUITIN, "MKTAYI", "MQ"]], ids=["one", "list", "three"])
@pytest.mark.parametrize(
    "options", [{}, {"top_k": None}, {"top_k": 1}, {"top_k": 2}, {"function_to_apply": "sigmoid"}], ids=repr
)
def test_text_classification_is_transformers(classifiers, inputs, options):
    theirs = transformers.pipeline("text-classification", model=classifiers["text"])(inputs, **options)
    for batch_size in (1, 2):
        ours = pipeline("text-classification", model=classifiers["text"], batch_size=batch_size)(inputs, **options)
        assert_same(ours, theirs)


@pytest.mark.parametrize("inputs", [UBIQUITIN, [UBIQUITIN], [UBIQUITIN, "MKTAYI", "MQ"]], ids=["one", "list", "three"])
@pytest.mark.parametrize(
    "options", [{}, {"aggregation_strategy": "simple"}, {"ignore_labels": []}, {"ignore_labels": ["helix"]}], ids=repr
)
def test_token_classification_is_transformers(classifiers, inputs, options):
    theirs = transformers.pipeline("token-classification", model=classifiers["token"])(inputs, **options)
    for batch_size in (1, 2):
        ours = pipeline("token-classification", model=classifiers["token"], batch_size=batch_size)(inputs, **options)
        assert_same(ours, theirs)


@pytest.mark.parametrize("task", ["fill-mask", "feature-extraction"])
def test_batches_do_not_matter(folder, task):
    texts = [ONE, "MK<mask>", TWO] if task == "fill-mask" else [UBIQUITIN, "MK", "MKT"]
    one_by_one, together = (pipeline(task, folder, batch_size=size)(texts) for size in (1, 3))
    if task == "fill-mask":
        assert_same(together, one_by_one)
    else:
        for a, b in zip(together, one_by_one, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_device(folder):
    before = mx.default_device()
    try:
        pipeline("fill-mask", folder, device="cpu")
        assert mx.default_device() == mx.Device(mx.cpu)
        with pytest.raises(ValueError, match="is none of cpu"):
            pipeline("fill-mask", folder, device="tpu")
        if not mx.is_available(mx.gpu):
            for device in ("cuda", "cuda:0", "mps", 0):
                with pytest.raises(ValueError, match="MLX has no GPU here"):
                    pipeline("fill-mask", folder, device=device)
    finally:
        mx.set_default_device(before)


def test_model_and_tokenizer_of_one_commit(folder, tmp_path, monkeypatch):
    """A push between the two: both are those of the commit that was asked first. Private, and in a cache of its own."""
    one, two = (tmp_path / name for name in ("one", "two"))
    for place in (one, two):
        shutil.copytree(folder, place / "sub")
    (two / "sub" / "vocab.txt").write_text("pushed later")
    hub = Hub({("me/esm", "main"): one}, private={"me/esm": "secret"})
    with serve(hub) as endpoint:
        use(monkeypatch, endpoint)
        answer = hub.answer

        def push_after_weights(request):
            result = answer(request)
            if request.path.endswith("model.safetensors"):
                hub.push("me/esm", two)
            return result

        hub.answer = push_after_weights
        options = {"token": "secret", "subfolder": "sub", "cache_dir": tmp_path / "cache"}
        filled = pipeline("fill-mask", "me/esm", **options)(ONE)
        assert_same(filled, pipeline("fill-mask", folder)(ONE))
        assert {token for _, path, token in hub.requests if "/resolve/" in path} == {"secret"}
    again = pipeline("fill-mask", "me/esm", local_files_only=True, **options)(ONE)
    assert_same(again, filled)


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
