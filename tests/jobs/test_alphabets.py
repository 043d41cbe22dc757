"""Jobs with models for DNA, for pairs of residues and structure letters, and for structure letters."""

import numpy as np
import pytest
import torch
import transformers

from mlx_esm_hf import contacts, embed, fill_mask, perplexity, score
from mlx_esm_hf.training.finetune import finetune
from mlx_esm_hf.training.pretrain import pretrain
from tests.jobs.models import write_model
from tests.wild import WILD, write_wild

SEQUENCES = {
    "nucleotide-transformer": ("attccgattccgatnA", "ATTCCGATTCCGATNA", "ATTCCG<mask>ATTCCGA"),
    "saprot": ("MdEvVpM#", "MdEvVpM#", "Md<mask>Vp"),
    "protrek": ("DVPYN", "dvpyn", "dv<mask>yn"),
}


def name_of(kind):
    return next(name for name in WILD if kind.replace("-", "") in name.lower().replace("-", "").replace("_", ""))


@pytest.fixture(scope="module", params=SEQUENCES)
def wild(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_wild(folder, name_of(request.param))
    model = transformers.EsmForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()
    return request.param, str(folder), model, transformers.AutoTokenizer.from_pretrained(folder)


def test_embeddings(wild):
    """A row per token, without <cls> and <eos>."""
    kind, folder, model, tokenizer = wild
    written, cleaned, _ = SEQUENCES[kind]
    (result,) = embed([written], folder, pooling=["mean", "residues"])
    inputs = tokenizer(cleaned, return_tensors="pt")
    with torch.no_grad():
        states = model.esm(**inputs).last_hidden_state[0].numpy()
    states = states[1:] if tokenizer.eos_token_id is None else states[1:-1]
    np.testing.assert_allclose(result.arrays["residues"], states, atol=1e-4 * np.abs(states).max())
    np.testing.assert_allclose(result.arrays["mean"], states.mean(axis=0), atol=1e-4 * np.abs(states).max())


def test_masks(wild):
    kind, folder, model, tokenizer = wild
    masked = SEQUENCES[kind][2]
    (result,) = fill_mask([masked], folder, top_k=3)
    inputs = tokenizer(masked, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    place = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0, 0]
    scores, tokens = logits[place].softmax(-1).topk(3)
    assert result.arrays["tokens"][0].tolist() == tokens.tolist()
    np.testing.assert_allclose(result.arrays["scores"][0], scores, rtol=1e-3)
    assert result.arrays["positions"].tolist() == [int(place) - 1]


def test_other_jobs_are_refused_before_weights_are_loaded(wild):
    kind, folder, *_ = wild
    written = SEQUENCES[kind][0]
    jobs = [lambda: list(contacts([written], folder)), lambda: list(perplexity([written], folder, method="one-pass"))]
    if kind != "saprot":
        jobs.append(lambda: score(["K2A"], "MKT", folder))
    for job in jobs:
        with pytest.raises(ValueError, match="needs a model for proteins.*, but .* is for .* It works with embed"):
            job()


def test_perplexity(wild):
    """The residue of a pair is hidden, and its probability is that of all its pairs."""
    kind, folder, model, tokenizer = wild
    written, cleaned, _ = SEQUENCES[kind]
    (result,) = perplexity([written], folder, method="exact")
    ids = tokenizer(cleaned, return_tensors="pt")["input_ids"]
    names = tokenizer.convert_ids_to_tokens(ids[0])
    found = []
    for place, name in enumerate(names):
        if name.startswith("<") or name == "N":
            continue
        masked, group = ids.clone(), [ids[0, place]]
        masked[0, place] = tokenizer.mask_token_id
        if kind == "saprot":
            masked[0, place] = tokenizer.convert_tokens_to_ids(f"#{name[1]}")
            group = [i for token, i in tokenizer.get_vocab().items() if len(token) == 2 and token[0] == name[0]]
            assert len(group) == 21
        with torch.no_grad():
            found.append(model(masked).logits[0, place].log_softmax(-1)[group].logsumexp(0).item())
    assert result.arrays["pseudo_perplexity"][0] == pytest.approx(np.exp(-np.mean(found)), rel=1e-4)
    assert "one_pass_estimate" not in result.arrays


@pytest.mark.parametrize("method", ["masked-marginals", "wt-marginals"])
@pytest.mark.parametrize("sequence", ["MdEvVpM#", "MEVM"])
def test_mutations_of_pairs(tmp_path, method, sequence):
    """Log p(mutant) - log p(wild type) of residues, summed over the 21 pairs of each (SaProt, section 3)."""
    write_wild(tmp_path, "SaProt_650M_AF2")
    model = transformers.EsmForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    pairs = sequence if "d" in sequence else "M#E#V#M#"
    ids = tokenizer(pairs, return_tensors="pt")["input_ids"]
    if method == "masked-marginals":
        ids[0, 2] = tokenizer.convert_tokens_to_ids(f"#{pairs[3]}")
    with torch.no_grad():
        row = model(ids).logits[0, 2].log_softmax(-1)
    groups = [[i for token, i in tokenizer.get_vocab().items() if len(token) == 2 and token[0] == r] for r in "EW"]
    wild_type, mutant = (row[group].logsumexp(0).item() for group in groups)
    (found,) = score(["E2W"], sequence, str(tmp_path), method=method).rows
    assert found[str(tmp_path)] == pytest.approx(mutant - wild_type, abs=1e-4)


def test_a_scan_of_pairs_has_all_residues(tmp_path):
    write_wild(tmp_path, "SaProt_650M_AF2")
    assert len(score(None, "MdEvVp", str(tmp_path)).rows) == 60
    (found,) = score(["X2W"], "Md#vVp", str(tmp_path)).rows
    assert np.isfinite(found[str(tmp_path)])
    with pytest.raises(ValueError, match="score --method pseudo-perplexity needs a model for proteins"):
        score(["E2W"], "MdEvVp", str(tmp_path), method="pseudo-perplexity")


def test_proteins_in_pairs_are_scored_by_their_residues(tmp_path):
    """A model of proteins, which does not read structure letters, scores them."""
    model = str(write_model(tmp_path))
    assert score(["E2W"], "MdEvVp", model).rows == score(["E2W"], "MEV", model).rows


def test_training(wild, tmp_path):
    """Pretraining and fine-tuning take the model's sequences."""
    kind, folder, *_ = wild
    written = SEQUENCES[kind][0]
    fasta, table = tmp_path / "train.fasta", tmp_path / "table.csv"
    fasta.write_text("".join(f">{i}\n{written * 3}\n" for i in range(6)))
    rows = [f"{written[2 * (i % 3) :]}{written * (1 + i % 4)},{'ab'[i % 2]}" for i in range(12)]
    table.write_text("\n".join(["sequence,label", *rows]))
    settings = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no"}
    result = pretrain([str(fasta)], tmp_path / "pretrained", model=folder, context=32, **settings)
    assert result is not None
    metrics = finetune(str(table), tmp_path / "tuned", folder, task="classification", validation_share=0.5, **settings)
    assert np.isfinite(metrics["eval_loss"])
