import contextlib
import functools
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers

from mlx_esm_hf import MLXAutoModelForMaskedLM, MLXEsmForMaskedLM, load_protein_model, pipeline
from tests.hub import Hub, serve, use
from tests.jobs.models import UBIQUITIN, write_model
from tests.parity import hold

ONE, TWO = "MQIF<mask>KTLTGKTITLEVEPSDTIENVK", "MQ<mask>FVKTL<mask>GKT"


@pytest.fixture(scope="module", params=["ESM-2", "ESM-1b"])
def folder(request, tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp(request.param), request.param))


def load_pipeline(folder):
    return pipeline("fill-mask", folder)


def load_jobs_model(folder):
    return load_protein_model(MLXAutoModelForMaskedLM, folder)


def split_numbers(answer):
    """Replace the numbers of an answer by their types, and return the numbers in order."""
    numbers = []

    def without(part):
        if isinstance(part, list):
            return [without(item) for item in part]
        if isinstance(part, dict):
            return {key: without(item) for key, item in part.items()}
        if isinstance(part, (float, np.floating)):
            numbers.append(part)
            return type(part)
        return part

    return without(answer), numbers


@functools.cache
def torch_pipeline(task, model, dtype):
    return transformers.pipeline(task, model=model, dtype=dtype)


def compare_with_transformers(task, model, all_inputs, batch_sizes=(1,), **options):
    """Check answers against transformers' pipeline, all numbers together by the error bound of the parity tests."""
    ours, theirs, float64 = [], [], []
    for batch_size in batch_sizes:
        our_pipeline = pipeline(task, model=model, batch_size=batch_size)
        for inputs in all_inputs:
            shape, numbers = split_numbers(our_pipeline(inputs, **options))
            expected_shape, expected = split_numbers(torch_pipeline(task, model, torch.float32)(inputs, **options))
            assert shape == expected_shape
            ours, theirs = ours + numbers, theirs + expected
            float64 += split_numbers(torch_pipeline(task, model, torch.float64)(inputs, **options))[1]
    hold(f"pipeline({task!r})", "scores", "ESM-1b, ESM-2", ours, theirs, float64)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"targets": ["A", "W", "L"]}, {"targets": "K"}], ids=repr)
def test_fill_mask_matches_transformers(folder, options):
    compare_with_transformers("fill-mask", folder, [ONE, TWO, [ONE], [TWO], [ONE, TWO], [ONE, ONE]], **options)


def test_feature_extraction_matches_transformers(folder):
    compare_with_transformers("feature-extraction", folder, [UBIQUITIN, ["MKT"], ["MKT", "ACDEF"]])


SEQUENCES = [UBIQUITIN, [UBIQUITIN], [UBIQUITIN, "MKTAYI", "MQ"]]
LABELS = {
    "exclusive": {"id2label": {0: "helix", 1: "B-sheet", 2: "I-sheet", 3: "O"}},
    "not exclusive": {"id2label": {0: "a", 1: "b"}, "problem_type": "multi_label_classification"},
    "regression": {"num_labels": 1, "problem_type": "regression"},
    "one": {"num_labels": 1},
}


@pytest.fixture(scope="module", params=LABELS)
def classifiers(request, folder, tmp_path_factory):
    """{task: folder} of classifiers that transformers made from the model."""
    return write_classifiers(folder, tmp_path_factory.mktemp("classifiers"), LABELS[request.param])


def write_classifiers(folder, place, labels):
    folders = {}
    for task, name in (("text", "EsmForSequenceClassification"), ("token", "EsmForTokenClassification")):
        torch.manual_seed(0)
        settings = labels | {"initializer_range": 0.2}
        model = getattr(transformers, name).from_pretrained(folder, **settings)
        folders[task] = str(place / task)
        model.save_pretrained(folders[task])
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folders[task])
    return folders


@pytest.mark.parametrize(
    "options", [{}, {"top_k": None}, {"top_k": 1}, {"top_k": 2}, {"function_to_apply": "sigmoid"}], ids=repr
)
def test_text_classification_matches_transformers(classifiers, options):
    # Pieces of ubiquitin as well: of a few numbers alone, torch's error is a matter of luck.
    pieces = [UBIQUITIN[i:] for i in range(1, 70, 3)]
    compare_with_transformers("text-classification", classifiers["text"], [*SEQUENCES, pieces], (1, 2), **options)


@pytest.mark.parametrize(
    "options", [{}, {"aggregation_strategy": "simple"}, {"ignore_labels": []}, {"ignore_labels": ["helix"]}], ids=repr
)
def test_token_classification_matches_transformers(classifiers, options):
    compare_with_transformers("token-classification", classifiers["token"], SEQUENCES, (1, 2), **options)


@pytest.mark.parametrize("task", ["fill-mask", "feature-extraction"])
def test_batch_size_does_not_change_results(folder, task):
    texts = [ONE, "MK<mask>", TWO] if task == "fill-mask" else [UBIQUITIN, "MK", "MKT"]
    compare_with_transformers(task, folder, [texts], batch_sizes=(1, 3))


def test_device(folder):
    before = mx.default_device()
    try:
        pipeline("fill-mask", folder, device="cpu")
        assert mx.default_device() == mx.Device(mx.cpu)
        with pytest.raises(ValueError, match="is not one of cpu"):
            pipeline("fill-mask", folder, device="tpu")
        if not mx.is_available(mx.gpu):
            for device in ("cuda", "cuda:0", "mps", 0):
                with pytest.raises(ValueError, match="MLX has no GPU here"):
                    pipeline("fill-mask", folder, device=device)
    finally:
        mx.set_default_device(before)


def test_model_and_tokenizer_of_one_commit(folder, tmp_path, monkeypatch):
    """Both come from the commit of the first request, whatever is pushed in between. The repository is private."""
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
        assert filled == pipeline("fill-mask", folder)(ONE)
        assert {token for _, path, token in hub.requests if "/resolve/" in path} == {"secret"}
    again = pipeline("fill-mask", "me/esm", local_files_only=True, **options)(ONE)
    assert again == filled


def test_jobs_load_model_and_tokenizer_of_one_commit(folder, tmp_path, monkeypatch):
    """Jobs do so as well, and report a damaged or missing tokenizer file."""
    hub = Hub({("me/esm", "v1"): folder}, private={"me/esm": "secret"})
    later = Path(shutil.copytree(folder, tmp_path / "later"))
    (later / "vocab.txt").write_text("pushed later")
    options = {"revision": "v1", "token": "secret", "cache_dir": tmp_path / "cache"}
    with serve(hub) as endpoint:
        use(monkeypatch, endpoint)
        answer = hub.answer
        hub.fail("GET .*vocab.txt", "corrupt")

        def push_after_weights(request):
            result = answer(request)
            if request.path.endswith("model.safetensors"):
                hub.push("me/esm", later, "v1")
            return result

        hub.answer = push_after_weights
        with pytest.raises(OSError, match="vocab.txt was damaged in the download"):
            load_protein_model(MLXAutoModelForMaskedLM, "me/esm", **options)
        hub.push("me/esm", folder, "v1")
        options["cache_dir"] = tmp_path / "other"
        loaded = load_protein_model(MLXAutoModelForMaskedLM, "me/esm", **options)
        assert len(loaded.tokenizer) == 33 and loaded.revision != hub.commit("me/esm", "v1")
        assert {token for _, path, token in hub.requests if "/resolve/" in path} == {"secret"}
        (later / "vocab.txt").unlink()
        hub.push("me/esm", later, "v2")
        with pytest.raises(
            OSError, match="me/esm has no tokenizer: vocab.txt not found. Save the tokenizer of the base model"
        ):
            load_protein_model(MLXAutoModelForMaskedLM, "me/esm", **(options | {"revision": "v2"}))
    with pytest.raises(OSError, match="later has no tokenizer: vocab.txt not found"):
        load_protein_model(MLXAutoModelForMaskedLM, str(later))


def test_options(folder):
    model = MLXEsmForMaskedLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert pipeline("fill-mask", model, tokenizer)(ONE) == pipeline("fill-mask", folder)(ONE)
    assert pipeline("fill-mask", Path(folder), Path(folder))(ONE) == pipeline("fill-mask", folder)(ONE)
    with pytest.raises(ValueError, match="needs its tokenizer"):
        pipeline("fill-mask", model)
    with pytest.raises(KeyError, match="Unknown task fold"):
        pipeline("fold", folder)
    with pytest.raises(ValueError, match="No mask_token"):
        pipeline("fill-mask", folder)("MKT")
    with pytest.warns(UserWarning, match="'JJ' is not in the vocabulary"):
        compare_with_transformers("fill-mask", folder, [ONE], targets=["JJ", "A"])
    features = pipeline("feature-extraction", folder)("MKT", return_tensors=True)
    assert features.shape == (1, 5, 32)


@pytest.mark.parametrize("tokenizer_class", ["EsmTokenizer", "Tokenizer"])
@pytest.mark.parametrize("loading", [load_pipeline, load_jobs_model])
def test_tokenizer_code_is_not_run(loading, tokenizer_class, tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model")
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Tokenizer: pass\n")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": tokenizer_class}
    path.write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}))
    asked = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    with contextlib.suppress(ValueError):  # transformers uses its own class if it has one
        loading(str(folder))
    assert not asked and not ran.exists()


@pytest.mark.parametrize(
    "task, inputs, options",
    [
        ("fill-mask", ONE, {"top_k": 2}),
        ("fill-mask", ONE, {"targets": ["A", "W"]}),
        ("feature-extraction", "MKT", {"truncation": True}),
        ("sentiment-analysis", UBIQUITIN, {"top_k": None}),
        ("text-classification", UBIQUITIN, {"truncation": True, "max_length": 9, "function_to_apply": "sigmoid"}),
        ("ner", "MKTAYI", {"aggregation_strategy": "simple", "ignore_labels": []}),
    ],
    ids=repr,
)
def test_options_at_construction(folder, tmp_path, task, inputs, options):
    """Options of the pipeline are defaults of its calls, and a call can override them."""
    kind = {"sentiment-analysis": "text", "text-classification": "text", "ner": "token"}.get(task)
    model = folder if kind is None else write_classifiers(folder, tmp_path, LABELS["exclusive"])[kind]
    ignored = {"framework": "pt", "num_workers": 2, "use_fast": True, "trust_remote_code": False}
    theirs = transformers.pipeline(task, model=model, dtype=torch.float32, **options)
    ours = pipeline(task, model=model, model_kwargs={"low_cpu_mem_usage": True}, **ignored, **options)
    for batch in (inputs, [inputs, inputs]):
        shape, numbers = split_numbers(ours(batch, batch_size=2, num_workers=1))
        expected_shape, expected = split_numbers(theirs(batch))
        assert shape == expected_shape
        assert np.allclose(numbers, expected, atol=1e-5)
    if "top_k" in options:
        assert len(ours(inputs, top_k=1)) == 1
    with pytest.raises(TypeError, match="'topk'"):
        pipeline(task, model=model, topk=3)
    with pytest.raises(ValueError, match="batch_size must be an integer from 1 to"):
        ours(inputs, batch_size=0)


def test_generators_are_read_batch_by_batch(folder):
    read = []

    def texts():
        for text in (ONE, ONE, TWO):
            read.append(text)
            yield text

    fill = pipeline("fill-mask", folder, batch_size=2)
    results = fill(texts())
    assert not read
    assert next(results) == fill([ONE, ONE, TWO])[0] and len(read) == 2
    assert len(list(results)) == 2


def test_save_pretrained(folder, tmp_path):
    fill = pipeline("fill-mask", folder, top_k=1)
    fill.save_pretrained(tmp_path)
    assert pipeline("fill-mask", str(tmp_path), top_k=1)(ONE) == fill(ONE)
