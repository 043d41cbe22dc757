import json

import pytest

from mlx_esm_hf.cli.running import print_training_summary


@pytest.mark.parametrize("perplexity", [True, False])
def test_language_models_have_a_perplexity(perplexity, tmp_path, capsys):
    """The exponential of a regression's squared error could overflow."""
    loss = 2.0 if perplexity else 1e6
    lines = [{"step": 3, "tokens": 90, "loss": loss}, {"step": 3, "eval_loss": loss, "eval_spearman": 0.5}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print_training_summary(tmp_path, perplexity)
    printed = capsys.readouterr().err
    assert "spearman 0.5" in printed
    assert ("perplexity 7.389" in printed) == perplexity
    assert ("perplexity" in printed.replace(str(tmp_path), "")) == perplexity
