"""A command that cannot succeed ends before it downloads weights, and its message says what is wrong."""

import json
import shutil

import pytest

from tests.cli.invoking import invoke
from tests.hub import Hub, serve, use
from tests.jobs.models import write_folding_model, write_model

LANGUAGE, FOLDING, ABSOLUTE, WORDS = "me/esm", "me/fold", "me/esm1b", "me/words"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders: a language model, a folding model, one with room for 10 residues, one with another vocabulary."""
    root = tmp_path_factory.mktemp("checkpoints")
    write_model(root / "esm")
    write_folding_model(root / "fold")
    write_model(root / "esm1b", "ESM-1b", positions=14)
    words = shutil.copytree(root / "esm", root / "words")
    (words / "vocab.txt").write_text("<cls>\n<pad>\n<eos>\n<unk>\nthe\nof\n<mask>\n")
    return root


@pytest.fixture
def hub(checkpoints, tmp_path, monkeypatch):
    repos = {LANGUAGE: "esm", FOLDING: "fold", ABSOLUTE: "esm1b", WORDS: "words"}
    hub = Hub({(repo, "main"): checkpoints / folder for repo, folder in repos.items()})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve(hub) as endpoint:
        use(monkeypatch, endpoint)
        yield hub


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with good and bad files, which the command runs in."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    proteins = ">a\nMKT<mask>YIAKQR\n>b\nGGACDE<mask>\n"
    (place / "good.fasta").write_text(proteins)
    (place / "plain.fasta").write_text(">a\nMKTAYIAKQR\n>b\nGGACDE\n")
    (place / "long.fasta").write_text(">a\nMKTAYIAKQRGG<mask>\n")
    (place / "empty.fasta").write_text("")
    (place / "bad.fasta").write_text(">a\nMK1\n>b\n\n")
    (place / "words.txt").write_text("these are not proteins\n")
    (place / "folder").mkdir()
    (place / "good.csv").write_text("mutant\nM1A\n")
    (place / "mutation.csv").write_text("mutation\nM1A\n")
    (place / "other.csv").write_text("mutant\nW1A\n")
    rows = "".join(f"MKT{a}{b}IAKQR,{'xy'[a < 'D']}\n" for a in "ACDEF" for b in "GHIKL")
    (place / "table.csv").write_text("sequence,label\n" + rows)
    (place / "short.csv").write_text("sequence,label\nMKT,x\n")
    (place / "taken.txt").write_text("taken\n")
    return place


# The arguments of a command that would succeed: {command: (input, suffix of the output, options)}.
COMMANDS = {
    "embed": ("good.fasta", ".h5", []),
    "fill-mask": ("good.fasta", ".csv", []),
    "contacts": ("plain.fasta", ".npz", []),
    "perplexity": ("good.fasta", ".csv", []),
    "generate": ("good.fasta", ".fasta", []),
    "fold": ("plain.fasta", "", []),
    "score": ("good.csv", ".csv", ["--sequence", "MKTAYI"]),
    "train": ("plain.fasta", "", ["--steps", "1"]),
    "finetune": ("table.csv", "", ["--epochs", "1"]),
}
READS_FASTA = [name for name in COMMANDS if name not in ("score", "finetune")]
WRITES_FILE = [name for name in COMMANDS if name not in ("train", "finetune", "fold")]


def run(hub, name, *options, source=None, output=None, model=None):
    """Run a command. Return its exit code, its output in one line, and the weights that it requested."""
    usual, suffix, others = COMMANDS[name]
    model = model or (FOLDING if name == "fold" else LANGUAGE)
    arguments = [name, source or usual, "--model", model, "--output", output or f"out{suffix}", *others, *options]
    code, shown = invoke(*arguments)
    weights = [path for method, path, _ in hub.requests if method == "GET" and path.endswith((".safetensors", ".bin"))]
    return code, shown, weights


def refused(hub, name, message, **arguments):
    options = arguments.pop("options", [])
    code, shown, weights = run(hub, name, *options, **arguments)
    assert code in (1, 2) and message in shown, shown
    assert not weights
    return shown


@pytest.mark.parametrize("name", ["embed", "score", "fold"])
def test_a_good_command_downloads_the_weights(hub, place, name):
    code, shown, weights = run(hub, name)
    assert code == 0 and len(weights) == 1, shown


@pytest.mark.parametrize("name", COMMANDS)
def test_missing_file(hub, place, name):
    shown = refused(hub, name, "File not found: nothere.x.", source="nothere.x")
    assert not hub.requests and "To pass a sequence" not in shown


@pytest.mark.parametrize("name", READS_FASTA)
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("folder", "folder is a folder"),
        ("empty.fasta", "empty.fasta contains no proteins"),
        ("words.txt", "words.txt, line 1: this is not FASTA"),
    ],
)
def test_other_file(hub, place, name, source, message):
    refused(hub, name, message, source=source)
    assert not hub.requests


@pytest.mark.parametrize("name", READS_FASTA)
def test_file_without_usable_proteins(hub, place, name):
    refused(hub, name, "bad.fasta contains no proteins", source="bad.fasta")


@pytest.mark.parametrize("name", READS_FASTA)
def test_bare_sequence(hub, place, name):
    hint = "File not found: MKTAYIAKQR. To pass a sequence, write a FASTA file or pipe it to `-`."
    if name == "train":
        hint = "File not found: MKTAYIAKQR."
    refused(hub, name, hint, source="MKTAYIAKQR")


@pytest.mark.parametrize("name", WRITES_FILE)
def test_unknown_suffix(hub, place, name):
    refused(hub, name, "Can't write `.jpeg`. Use ", output="out.jpeg")
    assert not hub.requests


@pytest.mark.parametrize(
    ("name", "output", "message"),
    [
        (
            "embed",
            "e.csb",
            "Can't write `.csb`. Use ",
        ),
        ("embed", "e.parqet", "Did you mean .parquet?"),
        ("perplexity", "e.csvs", "Did you mean .csv?"),
        ("fold", "e.pbd", "Did you mean .pdb?"),
    ],
)
def test_misspelt_suffix(hub, place, name, output, message):
    refused(hub, name, message, output=output)


@pytest.mark.parametrize("name", COMMANDS)
def test_output_is_taken(hub, place, name):
    suffix = COMMANDS[name][1]
    taken = place / f"out{suffix}"
    if suffix:
        taken.write_text("taken")
    else:
        taken.mkdir()
        (taken / "taken.txt").write_text("taken")
    refused(hub, name, "already exists")
    assert not hub.requests


@pytest.mark.parametrize("name", [name for name in WRITES_FILE if name != "score"])
def test_folder_of_shards_is_taken(hub, place, name):
    shards = place / f"out{COMMANDS[name][1]}.shards"
    shards.mkdir()
    (shards / "mine.txt").write_text("mine")
    refused(hub, name, "already exists and is not a run")
    assert not hub.requests


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("model", ["./nomodel", "/no/model", "no/such/model", "~/nomodel"])
def test_missing_folder_of_a_model(hub, place, name, model):
    refused(hub, name, f"Folder {model} not found.", model=model)
    assert not hub.requests


@pytest.mark.parametrize("name", COMMANDS)
def test_file_for_a_model(hub, place, name):
    refused(hub, name, "./good.fasta is a file", model="./good.fasta")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "fold"])
def test_folding_model_for_another_job(hub, place, name):
    refused(hub, name, "`me/fold` is a folding model", model=FOLDING)


def test_language_model_cannot_fold(hub, place):
    wanted = "`me/esm` is a language model. Folding needs an ESMFold model such as facebook/esmfold_v1."
    refused(hub, "fold", wanted, model=LANGUAGE)
    refused(hub, "fold", wanted.replace(LANGUAGE, "demo"), model="demo")


@pytest.mark.parametrize("name", ["embed", "fill-mask", "contacts", "perplexity", "generate", "score", "train"])
def test_vocabulary_without_residues(hub, place, name):
    refused(hub, name, "lacks the residues", model=WORDS)


@pytest.mark.parametrize("name", ["embed", "fill-mask", "contacts", "perplexity", "generate"])
def test_too_long_protein(hub, place, name):
    refused(hub, name, "accepts at most 10", model=ABSOLUTE, source="long.fasta")


def test_too_long_for_score_and_finetune(hub, place):
    refused(hub, "score", "accepts at most 10", model=ABSOLUTE, options=["--sequence", "MKTAYIAKQRGG"])
    shown = (place / "table.csv").read_text().replace("MKT", "MKTMKT")
    (place / "table.csv").write_text(shown)
    refused(hub, "finetune", "accepts at most 12", model=ABSOLUTE)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("embed", ["--layers", "99"], "Layer 99 not found. The model has the layers 0 to 3"),
        ("embed", ["--layers", ""], "--layers"),
        ("embed", ["--pooling", ""], "pooling must be any of mean, cls, max, residues, chains"),
        ("embed", ["--pooling", "mena"], "Did you mean mean?"),
        ("embed", ["--long", "windows"], "Did you mean window?"),
        ("embed", ["--device", "cup"], "Did you mean cpu?"),
        ("embed", ["--dtype", "flaot32"], "Did you mean float32?"),
        ("embed", ["--activation-dtype", "int9"], "Did you mean int8?"),
        ("embed", ["--activation-dtype", "int8"], "is not quantized"),
        ("embed", ["--batch-tokens", "0"], "--batch-tokens"),
        ("perplexity", ["--method", "onepass"], "Did you mean one-pass?"),
        ("score", ["--method", "masked-marginal"], "Did you mean masked-marginals?"),
        ("score", ["--sequence", "nothere.fasta"], "File not found: nothere.fasta."),
        ("score", ["--sequence", "empty.fasta"], "empty.fasta contains no proteins"),
        ("score", ["--sequence", "folder"], "folder is a folder"),
        ("score", ["--picture", "map.bmp"], "map.bmp"),
        ("score", ["--picture", "map.png"], "Leave out the list of mutants"),
        ("generate", ["--order", "gibs"], "Did you mean gibbs?"),
        ("generate", ["--fixed", "x"], "is not a list of positions"),
        ("generate", ["--length", "10"], "Give a FASTA with `<mask>` or `--length N`, not both."),
        ("contacts", ["--structure", "no.pdb"], "structure needs a picture"),
        ("contacts", ["--picture", "map.gif"], "map.gif"),
        ("contacts", ["--top", "taken.txt"], "taken.txt already exists"),
        ("fold", ["--formats", "pbd"], "Did you mean pdb?"),
        ("fold", ["--num-recycles", "-1"], "--num-recycles"),
        ("fold", ["--dtype", "float16"], "The folding trunk cannot be float16"),
        ("fold", ["--dtype", "bfloat61"], "Did you mean bfloat16?"),
        ("train", ["--weights", "1,2"], "for each of the 1 files"),
        ("train", ["--validation", "nothere.fasta"], "File not found: nothere.fasta."),
        ("train", ["--validation", "folder"], "folder is a folder"),
        ("train", ["--schedule", "cosin"], "Did you mean cosine?"),
        ("train", ["--picture", "loss.bmp"], "loss.bmp"),
        ("finetune", ["--validation", "nothere.csv"], "File not found: nothere.csv."),
        ("finetune", ["--task", "clasification"], "Did you mean classification?"),
        ("finetune", ["--train", "lroa"], "Did you mean lora?"),
        ("finetune", ["--schedule", "cosin"], "Did you mean cosine?"),
        ("finetune", ["--label-column", "lable"], "Pass `--label-column label`"),
        ("finetune", ["--metrics", "acuracy"], "Did you mean accuracy?"),
        ("finetune", ["--best", "acuracy"], "Did you mean accuracy?"),
        ("finetune", ["--target-modules", "qurey"], "qurey"),
        ("finetune", ["--dropout", "1"], "--dropout"),
    ],
)
def test_options(hub, place, name, options, message):
    refused(hub, name, message, options=options)


def test_structure_and_chain(hub, place):
    (place / "one.fasta").write_text(">a\nMKTAYIAKQR\n")
    (place / "broken.pdb").write_text("not a structure\n")
    map_of = {"source": "one.fasta"}
    refused(
        hub, "contacts", "File not found: no.pdb.", options=["--picture", "m.png", "--structure", "no.pdb"], **map_of
    )
    refused(hub, "contacts", "broken.pdb", options=["--picture", "m.png", "--structure", "broken.pdb"], **map_of)
    refused(hub, "contacts", "exactly one protein", options=["--picture", "m.png"])
    assert not hub.requests


@pytest.mark.parametrize("name", ["fill-mask", "generate"])
def test_no_mask(hub, place, name):
    shown = refused(hub, name, "No sequence in plain.fasta contains `<mask>`.", source="plain.fasta")
    assert "line 1" not in shown


def test_mutation_tables(hub, place):
    wanted = "No column 'mutant' in mutation.csv (columns: mutation). Pass `--mutant-column mutation`."
    refused(hub, "score", wanted, source="mutation.csv")
    refused(hub, "score", "No mutant matches the sequence", source="other.csv")
    (place / "scored.csv").write_text(f"mutant,{LANGUAGE}\nM1A,0\n")
    refused(hub, "score", f"Two columns would be named '{LANGUAGE}'.", source="scored.csv")
    refused(hub, "score", "empty.fasta", source="empty.fasta")
    refused(hub, "score", "folder is a folder", source="folder")
    refused(hub, "finetune", "folder is a folder", source="folder")
    assert not hub.requests


def test_finetune_tables(hub, place):
    refused(hub, "finetune", "words.txt", source="words.txt")
    refused(hub, "finetune", "contains only the class 'x'", source="short.csv")
    refused(
        hub,
        "finetune",
        "No column 'label' in mutation.csv",
        source="mutation.csv",
        options=["--sequence-column", "mutation"],
    )


def test_several_models_are_checked_before_the_first_is_loaded(hub, place):
    refused(hub, "score", "`me/fold` is a folding model", options=["--model", FOLDING])
    refused(hub, "score", "Folder ./nomodel not found", options=["--model", "./nomodel"])


@pytest.mark.parametrize("name", ["embed", "contacts", "fold", "score"])
def test_settings_of_an_earlier_run(hub, place, name):
    """A run with other settings is refused; the message names them."""
    shards = place / "out" if name == "fold" else place / f"out{COMMANDS[name][1]}.shards"
    folder = shards / "1" if name == "score" else shards
    folder.mkdir(parents=True)
    manifest = {"version": 1, "command": name, "settings": {"model": "me/other"}, "input": {"name": "x", "sha256": "y"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    shown = refused(hub, name, "belongs to a run with other settings")
    assert "model: me/other; now: " in shown


def convert(hub, *arguments):
    code, shown = invoke("convert", *arguments)
    assert code in (1, 2)
    assert not [path for _, path, _ in hub.requests if path.endswith((".safetensors", ".bin"))]
    return shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "flaot16"], "Did you mean float16?"),
        (["--quantize", "--dequantize"], "not both"),
        (["--dequantize"], "me/esm is not quantized"),
        (["--quantize", "--bits", "0"], "--bits"),
        (["--quantize", "--bits", "7"], "bits must be one of 2, 3, 4, 5, 6, 8"),
        (["--quantize", "--group-size", "0"], "--group-size"),
        (["--bits", "4"], "bits: only valid with quantize"),
        (["--quantize", "--mode", "afine"], "Did you mean affine?"),
        (["--quantize", "--rule", "x"], "--rule must be PATTERN=HOW"),
        (["--quantize", "--rule", "nothere.*=8"], "nothere.*"),
        (["--max-shard-size", "x"], "max_shard_size"),
        (["--max-shard-size", "0"], "max_shard_size"),
        (["--max-shard-size", "-5GB"], "max_shard_size"),
        (["--report", "nothere.fasta"], "File not found: nothere.fasta."),
        (["--report", "empty.fasta"], "no proteins"),
        (["--report", "folder"], "folder is a folder"),
        (["--revision", "nothere"], "nothere"),
    ],
)
def test_convert(hub, place, options, message):
    assert message in convert(hub, LANGUAGE, "out", *options)


def test_convert_output_and_source(hub, place):
    assert "Folder ./nomodel not found." in convert(hub, "./nomodel", "out")
    (place / "folder" / "x").write_text("x")
    assert "folder already exists" in convert(hub, LANGUAGE, "folder")
    assert "taken.txt already exists" in convert(hub, LANGUAGE, "taken.txt")
    assert not hub.requests
