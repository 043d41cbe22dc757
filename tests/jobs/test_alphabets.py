"""Jobs with models for DNA, for pairs of residues and structure letters, and for structure letters."""

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from mlx_esm_hf import contacts, embed, fill_mask, perplexity, score
from mlx_esm_hf.data.alphabets import Nucleotides, Pairs, StructureLetters
from mlx_esm_hf.data.proteins import Report
from mlx_esm_hf.data.tokenizer import load_tokenizer
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.quantization.convert import convert
from mlx_esm_hf.training.datasets import mask_residues
from mlx_esm_hf.training.finetune import finetune
from mlx_esm_hf.training.pretrain import pretrain
from tests.cli.invoking import invoke
from tests.jobs.models import write_model
from tests.wild import WILD, write_wild

SEQUENCES = {
    "nucleotide-transformer": ("attccgattccgatnA", "ATTCCGATTCCGATNA", "ATTCCG<mask>ATTCCGA"),
    "saprot": ("MdEvVpM#", "MdEvVpM#", "Md#vVp"),
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
    hidden = tokenizer.convert_tokens_to_ids("#v") if kind == "saprot" else tokenizer.mask_token_id
    place = (inputs["input_ids"][0] == hidden).nonzero()[0, 0]
    scores, tokens = logits[place].softmax(-1).topk(3)
    assert result.arrays["tokens"][0].tolist() == tokens.tolist()
    np.testing.assert_allclose(result.arrays["scores"][0], scores, rtol=1e-3)
    assert result.arrays["positions"].tolist() == [int(place) - 1]


def test_other_jobs_are_refused_before_weights_are_loaded(wild, tmp_path):
    kind, folder, *_ = wild
    written = SEQUENCES[kind][0]
    jobs = [lambda: list(contacts([written], folder)), lambda: list(perplexity([written], folder, method="one-pass"))]
    jobs.append(lambda: convert(folder, tmp_path / "converted", quantize=True, report=[written]))
    if kind == "protrek":
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


def test_pseudo_perplexity_of_mutated_pairs(tmp_path):
    """The sum over all positions of the mutant of the log-probability of its residue, each masked in turn."""
    write_wild(tmp_path, "SaProt_650M_AF2")
    model = transformers.EsmForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    total = 0.0
    for place, pair in enumerate(("Md", "Wv", "Vp"), 1):
        ids = tokenizer("MdWvVp", return_tensors="pt")["input_ids"]
        ids[0, place] = tokenizer.convert_tokens_to_ids(f"#{pair[1]}")
        group = [i for token, i in tokenizer.get_vocab().items() if len(token) == 2 and token[0] == pair[0]]
        with torch.no_grad():
            total += model(ids).logits[0, place].log_softmax(-1)[group].logsumexp(0).item()
    (found,) = score(["E2W"], "MdEvVp", str(tmp_path), method="pseudo-perplexity").rows
    assert found[str(tmp_path)] == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("method", ["masked-marginals", "wt-marginals", "pseudo-perplexity"])
def test_mutations_of_dna(tmp_path, method):
    """Log p(mutated 6-mer) - log p(6-mer) of the tokens that a mutant changes."""
    write_wild(tmp_path, name_of("nucleotide-transformer"))
    model = transformers.EsmForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    wild_type, tokens = "ATTCCGGTCAAGTC", ["ATTCCG", "GTCAAG", "T", "C"]
    changed = {0: "AGTCCA", 2: "A"}  # by T2G, G6A and T13A
    ids = tokenizer(wild_type, return_tensors="pt")["input_ids"][0]
    assert tokenizer.convert_ids_to_tokens(ids[1:]) == tokens

    def row(ids, place, masked):
        ids = ids.clone()
        if masked:
            ids[1 + place] = tokenizer.mask_token_id
        with torch.no_grad():
            return model(ids[None]).logits[0, 1 + place].log_softmax(-1)

    if method == "pseudo-perplexity":
        mutant = ids.clone()
        for place, token in changed.items():
            mutant[1 + place] = tokenizer.convert_tokens_to_ids(token)
        expected = sum(row(mutant, place, True)[mutant[1 + place]].item() for place in range(len(tokens)))
    else:
        expected = 0.0
        for place, token in changed.items():
            log_p = row(ids, place, method == "masked-marginals")
            expected += (log_p[tokenizer.convert_tokens_to_ids(token)] - log_p[ids[1 + place]]).item()
    (found,) = score(["T2G:G6A:T13A"], wild_type.lower(), str(tmp_path), method=method).rows
    assert found[str(tmp_path)] == pytest.approx(expected, abs=1e-4)


def test_a_scan_of_dna_has_four_nucleotides(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_wild(folder, name_of("nucleotide-transformer"))
    found = score(None, "ATTCCGGT", str(folder), picture=tmp_path / "scan.png")
    assert [row["mutant"] for row in found.rows[:4]] == ["A1A", "A1C", "A1G", "A1T"]
    assert len(found.rows) == 32 and all(
        row[str(folder)] == 0 for row in found.rows if row["mutant"][0] == row["mutant"][-1]
    )
    assert (tmp_path / "scan.png").stat().st_size > 1000
    mixed = score(["T2G", "T2K"], "ATTCCGGT", str(folder))
    assert mixed.left_out == ["row 2: T2K: a nucleotide must be one of A, C, G, T."]
    assert score([], "ATTCCGGT", str(folder)).rows == []
    with pytest.raises(ValueError, match="No mutant is one of DNA.\nrow 1: T2K: a nucleotide must be one of"):
        score(["T2K"], "ATTCCGGT", str(folder))
    with pytest.raises(ValueError, match="needs a model for DNA, but .* is for proteins"):
        score(["T2G"], "ATTCCGGT", [str(folder), str(write_model(tmp_path / "protein"))])


def test_a_token_without_an_embedding_leaves_out_one_sequence(tmp_path):
    """The Nucleotide Transformer's vocabulary has <eos> and <bos>, for which it has no embeddings."""
    write_wild(tmp_path, name_of("nucleotide-transformer"))
    with pytest.warns(UserWarning, match=r"'2' has '<eos>', for which .* has no token"):
        results = list(embed(["ATTCCG", "ATTCCG<eos>", "GG"], str(tmp_path)))
    assert [result.id for result in results] == ["1", "3"]


@pytest.mark.parametrize(
    ("kind", "mutant", "wild_type", "replaced"),
    [
        ("saprot", "E2W", "MdEvBp", (1, "#")),
        ("saprot", "E2W", "MEBJ", (2, "#")),
        ("nucleotide-transformer", "T2G", "ATTCCGR", (1, "N")),
    ],
)
def test_score_reports_the_letters_of_the_wild_type_that_it_replaced(tmp_path, kind, mutant, wild_type, replaced):
    write_wild(tmp_path, name_of(kind))
    found = score([mutant], wild_type, [str(tmp_path)])
    assert (found.replaced, found.unknown) == replaced
    assert np.isfinite(found.rows[0][str(tmp_path)])


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


def test_masked_and_random_pairs_keep_their_structure_letter(tmp_path):
    write_wild(tmp_path, "SaProt_650M_AF2")
    vocabulary = Vocabulary(load_tokenizer(str(tmp_path)), "SaProt")
    ids = vocabulary.encode("MdEvVpK#" * 2000)
    inputs, labels = mask_residues(ids, vocabulary, np.random.default_rng(0))
    before, after = vocabulary.decode(ids), vocabulary.decode(inputs)
    assert [pair[1] for pair in after] == [pair[1] for pair in before]
    changed = {new[0] for old, new in zip(before, after, strict=True) if old != new}
    assert changed == set("ACDEFGHIKLMNPQRSTVWY#")
    assert np.array_equal(labels[labels != -100], ids[labels != -100])


def test_spans_of_tokens(tmp_path):
    """The nucleotides of each token."""
    write_wild(tmp_path, name_of("nucleotide-transformer"))
    (result,) = embed(["ATTCCGATTCCGNCA"], str(tmp_path), pooling=["residues", "spans"])
    assert result.arrays["spans"].tolist() == [[0, 6], [6, 12], [12, 13], [13, 14], [14, 15]]
    assert len(result.arrays["residues"]) == 5


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_spans_in_files(tmp_path, suffix):
    """The rows of all sequences one after the other, in sequences without their gaps."""
    folder, path = tmp_path / "model", tmp_path / f"spans.{suffix}"
    folder.mkdir()
    write_wild(folder, name_of("nucleotide-transformer"))
    (tmp_path / "dna.fasta").write_text(">a\nATTCCGN-CA\n>b\nATT<eos>CCG\n>c\nGG\n")
    arguments = ("--model", folder, "--pooling", "residues,spans", "--output", path)
    code, output = invoke("embed", tmp_path / "dna.fasta", *arguments)
    assert code == 3 and "line 3: 'b' has '<eos>'" in output
    assert "1 gaps were dropped." in output and "--aligned" not in output
    arrays = load_file(path) if suffix == "safetensors" else np.load(path)
    assert arrays["spans"].tolist() == [[0, 6], [6, 7], [7, 8], [8, 9], [0, 1], [1, 2]]
    assert arrays["offsets"].tolist() == [0, 4, 6]
    assert len(arrays["residues"]) == 6
    with pytest.raises(ValueError, match="can't write spans, because a `.csv` file has one row per protein"):
        embed(tmp_path / "dna.fasta", str(folder), tmp_path / "spans.csv", pooling=["spans"])


FOLDSEEK = "P1\tMEV\tDVP\t1.0,2.0\nP2 chain A\tMKT\tVVD\t1.0\n"


def test_structure_letters_of_foldseek(tmp_path):
    """A table of Foldseek, or a FASTA file, gives what pairs in the FASTA file give."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_wild(folder, "SaProt_650M_AF2")
    (tmp_path / "plain.fasta").write_text(">P1\nMEV\n>P2\nM<mask>T\n>P3\nMKTA\n")
    (tmp_path / "pairs.fasta").write_text(">P1\nMdEvVp\n>P2\nMv#vTd\n")
    (tmp_path / "3di.tsv").write_text(FOLDSEEK)
    (tmp_path / "3di.fasta").write_text(">P1\ndvp\n>P2\nvvd\n")
    expected = list(embed(tmp_path / "pairs.fasta", str(folder)))
    for name in ("3di.tsv", "3di.fasta"):
        with pytest.warns(UserWarning, match=r"line 5: 'P3' has no structure letters in .*3di"):
            found = list(embed(tmp_path / "plain.fasta", str(folder), structure=tmp_path / name))
        assert [result.id for result in found] == ["P1", "P2"]
        assert all(np.array_equal(a.arrays["mean"], b.arrays["mean"]) for a, b in zip(found, expected, strict=True))
    (tmp_path / "one.fasta").write_text(">P1\nMEV\n")
    found = score(["E2W"], tmp_path / "one.fasta", str(folder), structure=tmp_path / "3di.tsv")
    assert found.rows == score(["E2W"], "MdEvVp", str(folder)).rows


@pytest.mark.parametrize("job", ["embed", "fill-mask", "perplexity", "score"])
def test_commands_take_structure_letters(tmp_path, job):
    """`--structure` writes what pairs in the FASTA file give."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_wild(folder, "SaProt_650M_AF2")
    residues, pair = ("ME<mask>", "#p") if job == "fill-mask" else ("MEB", "Bp")
    (tmp_path / "plain.fasta").write_text(f">P1\n{residues}\n")
    (tmp_path / "pairs.fasta").write_text(f">P1\nMdEv{pair}\n")
    (tmp_path / "3di.tsv").write_text("P1\tMEV\tDVP\t1.0\n")
    (tmp_path / "mutants.csv").write_text("mutant\nE2W\n")
    written = []
    for name, extra in (("plain", ("--structure", tmp_path / "3di.tsv")), ("pairs", ())):
        path, fasta = tmp_path / f"{name}.csv", tmp_path / f"{name}.fasta"
        inputs = (tmp_path / "mutants.csv", "--sequence", fasta) if job == "score" else (fasta,)
        code, output = invoke(job, *inputs, "--model", folder, "--output", path, *extra)
        assert code == 0, output
        assert ("1 letters outside the alphabet were read as #." in output) == (job != "fill-mask")
        written.append(path.read_text())
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("P1\tMEV\tDV\n", r"line 1: 'P1' has 3 residues, but 2 structure letters \(.*line 1\)"),
        ("P1\tMEV\tDVB\n", r"line 1: 'P1' has 'b', which is not a structure letter"),
        ("P1\tMEV\n", r"line 1: expected an id, residues and structure letters, separated by tabs"),
        ("P1\tMEV\tDVP\n" * 2, r"line 2: 'P1' has structure letters already, from .* line 1"),
    ],
)
def test_structure_letters_that_do_not_suit(tmp_path, text, message):
    folder = tmp_path / "model"
    folder.mkdir()
    write_wild(folder, "SaProt_650M_AF2")
    (tmp_path / "plain.fasta").write_text(">P1\nMEV\n")
    (tmp_path / "3di.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(embed(tmp_path / "plain.fasta", str(folder), structure=tmp_path / "3di.tsv", strict=True))
    with pytest.raises(ValueError, match=r"structure needs a model for pairs"):
        (tmp_path / "3di.tsv").write_text("P1\tMEV\tDVP\n")
        list(embed(tmp_path / "plain.fasta", str(write_model(tmp_path)), structure=tmp_path / "3di.tsv"))


def test_what_cleaning_reports():
    """The unknown letter of each alphabet, and gaps that `aligned` cannot keep."""
    report = Report()
    assert Pairs().clean("MdBvUp", report=report) == "Md#v#p"
    assert (report.replaced, report.unknown) == (2, "#")
    report = Report()
    assert Nucleotides(6).clean("AT-TR", report=report) == "ATTN"
    assert (report.replaced, report.unknown, report.gaps, report.can_align) == (1, "N", 1, False)
    for alphabet, sequence in ((Nucleotides(6), "AT-T"), (Pairs(), "ME-V"), (StructureLetters(), "dv-p")):
        with pytest.raises(ValueError, match="'-' at position|has a gap"):
            alphabet.clean(sequence, aligned=True)
    assert Pairs().clean("Md<mask>Vp") == "Md<mask>Vp"


def test_chains_of_an_antibody(tmp_path):
    """AbCDR's models join the heavy and light chain with `-`."""
    write_wild(tmp_path, name_of("abcdr"))
    model = transformers.EsmModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    (result,) = embed(["EVQLV-DIQMT"], str(tmp_path), aligned=True, pooling=["residues"])
    with torch.no_grad():
        states = model(**tokenizer("EVQLV-DIQMT", return_tensors="pt")).last_hidden_state[0, 1:-1].numpy()
    assert states.shape[0] == 11
    np.testing.assert_allclose(result.arrays["residues"], states, atol=1e-4 * np.abs(states).max())
