"""Loading a model with its tokenizer, and batching."""

import shutil

import mlx.core as mx
import numpy as np
import pytest

from mlx_esm_hf import (
    MLXAutoModel,
    MLXAutoModelForMaskedLM,
    contacts,
    embed,
    fill_mask,
    generate,
    load_protein_model,
    perplexity,
    pipeline,
    score,
)
from mlx_esm_hf.errors import CheckpointError, NonFiniteError
from mlx_esm_hf.ops import kernels
from tests.hub import Hub, serve, use
from tests.jobs.models import write_model
from tests.marks import needs_cpu, needs_kernels


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path / "esm2")


def test_model_and_tokenizer_of_one_commit(folder, tmp_path, monkeypatch):
    """What is pushed after the weights were downloaded is not read."""
    later = shutil.copytree(folder, tmp_path / "later")
    (later / "vocab.txt").write_text((folder / "vocab.txt").read_text().replace("L\nA\n", "A\nL\n"))
    hub = Hub({("me/esm", "main"): folder})
    with serve(hub) as endpoint:
        use(monkeypatch, endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        answer = hub.answer

        def push_after_weights(request):
            result = answer(request)
            if request.path.endswith("model.safetensors"):
                hub.push("me/esm", later)
            return result

        hub.answer = push_after_weights
        loaded = load_protein_model(MLXAutoModel, "me/esm")
        assert hub.commit("me/esm", "main") != loaded.revision
    assert loaded.vocabulary.ids == load_protein_model(MLXAutoModel, str(folder)).vocabulary.ids


def no_vocabulary(folder):
    (folder / "vocab.txt").unlink()


def cut_config(folder):
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class":')


def list_for_config(folder):
    (folder / "tokenizer_config.json").write_text("[1]")


def binary_vocabulary(folder):
    (folder / "vocab.txt").write_bytes(bytes(range(128, 256)))


@pytest.mark.parametrize("damage", [no_vocabulary, cut_config, list_for_config, binary_vocabulary])
def test_damaged_tokenizer(damage, folder):
    damage(folder)
    with pytest.raises((CheckpointError, OSError), match="tokenizer"):
        load_protein_model(MLXAutoModel, str(folder))


def test_unknown_device(folder):
    with pytest.raises(ValueError, match="device must be one of cpu, gpu, got 'tpu'"):
        load_protein_model(MLXAutoModel, str(folder), device="tpu")


@pytest.mark.skipif(mx.is_available(mx.gpu), reason="there is a GPU")
def test_missing_gpu(folder):
    with pytest.raises(ValueError, match="device='gpu': MLX has no GPU here"):
        load_protein_model(MLXAutoModel, str(folder), device="gpu")


def rows_of(model, lengths):
    """Return the number of rows of each batch of sequences of these lengths."""
    sequences = [np.full(length, model.vocabulary.ids["A"], np.int32) for length in lengths]
    return [len(batch.windows) for batch in model.batches(sequences)]


def test_rows_are_separated_if_padding_is_computed(folder, monkeypatch):
    monkeypatch.setattr(kernels, "native", None)
    model = load_protein_model(MLXAutoModel, str(folder), batch_tokens=16384)
    assert rows_of(model, [2000, 100, 99, 98]) == [1, 3]


@needs_cpu
@needs_kernels
def test_fewest_batches_if_they_are_packed(folder):
    model = load_protein_model(MLXAutoModel, str(folder), batch_tokens=16384)
    assert rows_of(model, [2000, 100, 99, 98]) == [4]


# Results that are NaN or infinite

MASKED, PLAIN = ("one", "MKT<mask>YI"), ("one", "MKTAYI")
JOBS = {
    **{
        name: lambda m, name=name: list(embed([PLAIN], m, pooling=[name]))
        for name in ("mean", "max", "cls", "residues")
    },
    "contacts": lambda m: list(contacts([PLAIN], m)),
    "fill-mask": lambda m: list(fill_mask([MASKED], m)),
    "perplexity": lambda m: list(perplexity([PLAIN], m)),
    "one pass": lambda m: list(perplexity([PLAIN], m, method="one-pass")),
    **{name: lambda m, name=name: list(generate([MASKED], m, order=name)) for name in ("confidence", "left-to-right")},
    "gibbs": lambda m: list(generate([MASKED], m, order="gibbs", sweeps=1, temperature=0)),
    **{
        name: lambda m, name=name: score(["K2A"], "MKTAYI", m, method=name)
        for name in ("masked-marginals", "wt-marginals", "pseudo-perplexity")
    },
}


def damaged(folder, value=np.nan, path="encoder.layer.1.output.dense.weight"):
    """Load a model, and change a value of a parameter."""
    model = load_protein_model(MLXAutoModelForMaskedLM, str(folder))
    *modules, name = path.split(".")
    module = model.network.esm
    for part in modules:
        module = module[int(part)] if part.isdecimal() else module[part]
    array = np.array(module[name])
    array.flat[0] = value
    module[name] = mx.array(array)
    return model


@pytest.mark.parametrize("job", JOBS)
def test_a_result_of_nan_is_an_error_that_names_protein_and_parameter(job, folder):
    with pytest.raises(NonFiniteError) as error:
        JOBS[job](damaged(folder))
    message = str(error.value)
    assert any(
        f"The result of {name!r} is NaN or infinite." in message for name in ("one", "position 2", "wild type", "K2A")
    )
    assert "Damaged parameters: esm.encoder.layer.1.output.dense.weight." in message


def test_the_first_layer_that_is_not_finite_is_named(folder):
    """In float16 the states of an intact model can overflow."""
    model = load_protein_model(MLXAutoModelForMaskedLM, str(folder), dtype="float16")
    layer = model.network.esm.encoder.layer[1].output.dense
    layer.weight = mx.full(layer.weight.shape, 6e4, mx.float16)
    expected = "'b' is NaN or infinite. .* are those of layer 2. Values above 65,504 overflow in float16: use float32"
    with pytest.raises(NonFiniteError, match=expected):
        list(embed([("b", "MKTAYI")], model, layers=[2]))


def test_one_protein_of_nan_is_named_and_the_others_are_kept(folder, tmp_path):
    """Only the protein with the damaged token is refused."""
    model = damaged(folder, path="embeddings.word_embeddings.weight")
    table = np.array(model.network.esm.embeddings.word_embeddings.weight)
    table[[0, model.vocabulary.ids["W"]]] = table[[model.vocabulary.ids["W"], 0]]
    table[0, 0] = 0
    table[model.vocabulary.ids["W"]] = np.nan
    model.network.esm.embeddings.word_embeddings.weight = mx.array(table)
    model.batch_tokens = 1
    proteins = [(f"p{i}", "MKTAYI" * 10 + ("W" if i == 40 else "")) for i in range(60)]
    fasta = tmp_path / "p.fasta"
    fasta.write_text("".join(f">{id}\n{sequence}\n" for id, sequence in proteins))
    with pytest.raises(NonFiniteError, match="'p40' is NaN or infinite. Damaged parameters: esm.embeddings.word_emb"):
        embed(fasta, model, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("shard-*"))) > 10  # the chunks before it
    assert len(list(embed(proteins[:40], model))) == 40


@pytest.mark.parametrize("task", ["fill-mask", "feature-extraction"])
def test_pipelines_refuse_nan(task, folder):
    model = damaged(folder)
    network = model.network if task == "fill-mask" else model.network.esm
    with pytest.raises(NonFiniteError, match="The result of sequence 1 is NaN .*encoder.layer.1.output.dense.weight"):
        pipeline(task, network, model.tokenizer)("MKT<mask>YI")
