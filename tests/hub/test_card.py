"""Model cards."""

import json

import numpy as np
import pytest
import transformers
from transformers import AutoTokenizer

from mlx_esm_hf import (
    MLXEsm1Config,
    MLXEsmConfig,
    MLXEsmForMaskedLM,
    MLXEsmForSequenceClassification,
)
from tests.hub import Repository
from tests.hub.publishing import (
    ID,
    TOKEN,
    card,
    code_blocks,
    load,
    logits,
    push,
    run_elsewhere,
)
from tests.tiny import SIZE


def test_card(hub, made):
    hub.repos["facebook/esm2"] = Repository()
    hub.repos["facebook/esm2"].commit({"README.md": b"---\nlicense: mit\n---\n"}, "Card")
    push(made, "me/made", base_model="facebook/esm2")
    data, text = card(hub, "me/made").data, card(hub, "me/made").text
    assert data.library_name == "transformers" and data.pipeline_tag == "fill-mask"
    assert data.base_model == "facebook/esm2" and data.license == "mit"
    assert {"mlx", "protein", "esm"} <= set(data.tags)
    parameters = sum(p.numel() for p in transformers.EsmForMaskedLM.from_pretrained(made).parameters())
    assert "EsmForMaskedLM" in text and "3 layers of width 32" in text and "float32" in text
    assert "facebook/esm2" in text
    assert abs(int(text.partition(" parameters")[0].rpartition(" ")[2].replace(",", "")) - parameters) < 100
    push(made, "me/licensed", license="apache-2.0")
    assert card(hub, "me/licensed").data.license == "apache-2.0" and card(hub, "me/licensed").data.base_model is None


def test_code_of_the_card_runs(hub, made, tmp_path):
    push(made)
    blocks = code_blocks(card(hub).text)
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        done = run_elsewhere(hub, tmp_path / f"home{number}", block + "\nprint(outputs.logits.shape)")
        assert done.returncode == 0, done.stderr
        assert "22, 33" in done.stdout


def test_card_of_a_model_from_the_hub(hub, made):
    """The card names the model that was fine-tuned. A repository that is pushed to itself names none."""
    push(made)
    model = MLXEsmForSequenceClassification.from_pretrained(ID, num_labels=2)
    model.push_to_hub("me/tuned", token=TOKEN)
    data = card(hub, "me/tuned").data
    assert data.base_model == ID and data.pipeline_tag == "text-classification"
    assert "MLXAutoModelForSequenceClassification" in card(hub, "me/tuned").text
    assert "AutoTokenizer" not in card(hub, "me/tuned").text  # the repository has no tokenizer


def test_card_of_models_that_transformers_cannot_load(hub, folder, tmp_path):
    MLXEsmForMaskedLM(MLXEsm1Config(**SIZE)).push_to_hub("me/esm1", token=TOKEN)
    data, text = card(hub, "me/esm1").data, card(hub, "me/esm1").text
    assert (
        data.library_name == "mlx"
        and "transformers cannot load this model: it does not know the model_type 'esm1'" in text
    )
    assert len(code_blocks(text)) == 1
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization": {"bits": 4, "group_size": 32}}))
    push(folder)
    assert "quantized to 4 bits in groups of 32" in card(hub).text
    assert "transformers cannot load this model: it is quantized for MLX" in card(hub).text
    assert "parameters" not in card(hub).text


def test_generated_card_is_overwritten(hub, made, sharded, folder):
    """It describes the earlier weights. Other metadata is kept, and so is a card that the user edited."""
    push(made, base_model="facebook/esm2", license="mit", tags=["tiny"])
    first = hub.commit(ID, "main")
    push(made)
    assert hub.commit(ID, "main") == first
    edited = hub.repos[ID].files()["README.md"].replace(b"license: mit", b"license: mit\ndatasets:\n- me/proteins")
    hub.repos[ID].commit(hub.repos[ID].files() | {"README.md": edited}, "On the site")
    (folder / "CONVERSION.md").write_text("8 bits")
    push(folder, tags=["small"])
    data, text = card(hub).data, card(hub).text
    assert "8 bits" in text and (data.base_model, data.license) == ("facebook/esm2", "mit")
    assert {"mlx", "tiny", "small"} <= set(data.tags) and data.datasets == ["me/proteins"]
    push(folder, base_model="facebook/other")
    assert card(hub).data.base_model == "facebook/other" and "(https://huggingface.co/facebook/other)" in card(hub).text
    mine = "".join(line for line in str(card(hub)).splitlines(keepends=True) if "overwrites this card" not in line)
    hub.repos[ID].commit(hub.repos[ID].files() | {"README.md": mine.encode()}, "Mine now")
    assert push(made, license="gpl-3.0").kept_card
    assert str(card(hub)) == mine


def test_tokenizer_first(hub, made):
    """The model's card replaces transformers' template, unless the template was edited."""
    tokenizer = AutoTokenizer.from_pretrained(made)
    tokenizer.push_to_hub(ID, token=TOKEN, tags=["tiny"])
    assert "[More Information Needed]" in card(hub).text
    load(str(made)).push_to_hub(ID, token=TOKEN)
    assert "[More Information Needed]" not in card(hub).text and "tiny" in card(hub).data.tags
    assert 'AutoTokenizer.from_pretrained("me/esm")' in card(hub).text and card(hub).data.pipeline_tag == "fill-mask"
    tokenizer.push_to_hub("me/filled", token=TOKEN)
    filled = hub.repos["me/filled"].files()["README.md"].replace(b"[More Information Needed]", b"Proteins", 1)
    hub.repos["me/filled"].commit(hub.repos["me/filled"].files() | {"README.md": filled}, "Mine")
    load(str(made)).push_to_hub("me/filled", token=TOKEN)
    assert hub.repos["me/filled"].files()["README.md"] == filled


def test_config_first(hub, made):
    MLXEsmConfig.from_pretrained(made).push_to_hub(ID, token=TOKEN)
    load(str(made)).push_to_hub(ID, token=TOKEN)
    assert "MLXAutoModelForMaskedLM" in card(hub).text
    np.testing.assert_array_equal(logits(load()), logits(load(str(made))))


def test_own_card(hub, folder):
    own = "---\nlicense: mit\n---\n# Mine\n"
    (folder / "README.md").write_text(own)
    push(folder, tags=["new"])
    assert card(hub).data.to_dict() == {"license": "mit", "tags": ["new"]} and "# Mine" in card(hub).text
    push(folder)
    assert hub.repos[ID].files()["README.md"] == own.encode()
    (folder / "README.md").unlink()
    kept = push(folder, tags=["new"])
    assert card(hub).data.tags == ["new"] and "# Mine" in card(hub).text and not kept.kept_card
    assert push(folder).kept_card
    commit = hub.commit(ID, "main")
    for metadata, message in (
        ("license: [1", "README.md: the metadata between the --- lines is not valid YAML"),
        ("mit", "README.md: the metadata between the --- lines is not valid YAML"),
        ("license: [1]", "Invalid metadata in README.md"),  # message of the Hub
    ):
        (folder / "README.md").write_text(f"---\n{metadata}\n---\n")
        with pytest.raises(ValueError, match=message):
            push(folder)
    assert hub.commit(ID, "main") == commit


def test_conversion_report_is_in_the_card(hub, folder):
    (folder / "CONVERSION.md").write_text("Δ = 0")
    push(folder)
    assert "## Conversion\n\nΔ = 0" in card(hub).text and "CONVERSION.md" in hub.repos[ID].files()


@pytest.mark.parametrize(
    ("name", "kind", "sequence"),
    [
        ("nucleotide-transformer-500m", "DNA", "ATTCCGATTCCGATTCCG"),
        ("SaProt_650M_AF2", "protein", "MdQvIpFq"),
        ("ProTrek-foldseek", "protein structure", "dvvlpcvqdp"),
    ],
)
def test_card_of_another_alphabet(hub, tmp_path, name, kind, sequence):
    """The card names what the model reads, and its code passes a sequence that the vocabulary has."""
    from tests.wild import write_wild

    write_wild(tmp_path, name)
    MLXEsmForMaskedLM.from_pretrained(tmp_path).save_pretrained(tmp_path)
    push(tmp_path, "me/wild")
    text, tags = card(hub, "me/wild").text, card(hub, "me/wild").data.tags
    assert f"A {kind} language model" in text and f'tokenizer("{sequence}"' in text
    assert kind.replace(" ", "-") in tags and ("protein" in tags) is (kind == "protein")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.unk_token_id not in tokenizer(sequence)["input_ids"]
