"""The common tests that fail on our classes, with the reason; docs/testing.md shows the table."""

from __future__ import annotations

from typing import NamedTuple

ESM = ("ESM-2", "ESM-1b")
ALL = (*ESM, "ESMC", "folding")
MACHINERY, DIFFERENCE, ALIKE = "torch machinery", "difference", "transformers fails too"


class Failure(NamedTuple):
    """Tests that fail for one reason.

    Attributes:
        kind: `MACHINERY`, `DIFFERENCE` (declared on the page "Migrating from transformers") or `ALIKE`.
        reason: a sentence for the documentation.
        families: families that fail.
        tests: names of tests.
        passes_loaded: whether they pass if the weights of a new model count as loaded.
    """

    kind: str
    reason: str
    families: tuple[str, ...]
    tests: tuple[str, ...]
    passes_loaded: bool = False


FAILURES = (
    Failure(
        MACHINERY,
        "They build a model on torch's meta device, or replace a function that initializes torch's parameters.",
        ALL,
        (
            "test_all_tensors_are_parameter_or_buffer",
            "test_cannot_load_with_meta_device_context_manager",
            "test_init_weights_can_init_buffers",
        ),
    ),
    Failure(
        MACHINERY,
        "They read gradients of intermediates from torch's graph. MLX differentiates functions.",
        (*ESM, "ESMC"),
        ("test_retain_grad_hidden_states_attentions",),
    ),
    Failure(
        MACHINERY,
        "They replace the function with which torch recomputes a layer.",
        (*ESM, "ESMC"),
        (
            "test_training_gradient_checkpointing",
            "test_training_gradient_checkpointing_use_reentrant_false",
            "test_training_gradient_checkpointing_use_reentrant_true",
        ),
    ),
    Failure(
        MACHINERY,
        "They read which attention each module dispatches to.",
        (*ESM, "ESMC"),
        ("test_sdpa_can_dispatch_non_composite_models",),
    ),
    Failure(MACHINERY, "They read plans of tensor parallelism.", ESM, ("test_tied_weights_are_sharded_together",)),
    Failure(MACHINERY, "They read plans of tensor parallelism.", ("ESMC",), ("test_tp_plan_matches_params",)),
    Failure(
        ALIKE,
        "`inputs_embeds` skips token dropout and positions, as in transformers.",
        ESM,
        ("test_inputs_embeds_matches_input_ids",),
    ),
    Failure(
        ALIKE,
        "The output of folding has no hidden states.",
        ("folding",),
        ("test_hidden_states_output", "test_retain_grad_hidden_states_attentions"),
    ),
    Failure(
        ALIKE,
        "The config of folding fills the fields of `esmfold_config` that were not given.",
        ("folding",),
        ("test_config_to_json_string",),
    ),
    Failure(
        DIFFERENCE,
        "`save_pretrained` leaves out the contact head of a new model, which nothing has trained. The tests pass if "
        "the weights count as loaded.",
        ESM,
        (
            "test_base_model_prefix_loads_base_weights",
            "test_bc_torch_dtype",
            "test_can_use_safetensors",
            "test_load_save_without_tied_weights",
        ),
        passes_loaded=True,
    ),
    Failure(
        DIFFERENCE,
        "`save_pretrained` leaves out the contact head of a new model, which nothing has trained. The tests pass if "
        "the weights count as loaded.",
        ("folding",),
        ("test_can_use_safetensors", "test_load_save_without_tied_weights"),
        passes_loaded=True,
    ),
    Failure(
        DIFFERENCE,
        "A checkpoint that lacks a part of the encoder is an error.",
        ALL,
        ("test_model_weights_reload_no_missing_tied_weights",),
    ),
    Failure(
        DIFFERENCE,
        "ESMC with tied embeddings or with scaled rotary positions is refused.",
        ("ESMC",),
        (
            "test_model_rope_scaling_from_config_0_linear",
            "test_model_rope_scaling_from_config_1_dynamic",
            "test_model_rope_scaling_from_config_2_yarn",
            "test_tied_weights_keys",
        ),
    ),
    Failure(DIFFERENCE, "A float16 trunk is refused.", ("folding",), ("test_bc_torch_dtype",)),
    Failure(
        DIFFERENCE,
        "Language models refuse the config of a folding model, and folding that of a language model.",
        ("folding",),
        ("test_base_model_prefix_loads_base_weights", "test_correct_missing_keys"),
    ),
    Failure(
        DIFFERENCE,
        "`config.json` leaves out generic fields in `esmfold_config`, which transformers 4 refuses.",
        ("folding",),
        ("test_config_from_and_save_pretrained_composite",),
    ),
)


def declared(family: str) -> dict[str, Failure]:
    """Return {test: its declared failure} of a family."""
    return {test: failure for failure in FAILURES if family in failure.families for test in failure.tests}


def table() -> str:
    """Return the Markdown table of the documentation."""
    rows = ["| kind | why | families | tests |", "|---|---|---|---|"]
    for kind in (MACHINERY, DIFFERENCE, ALIKE):
        for failure in FAILURES:
            if failure.kind == kind:
                tests = ", ".join(f"`{test}`" for test in failure.tests)
                rows.append(f"| {kind} | {failure.reason} | {', '.join(failure.families)} | {tests} |")
    return "\n".join(rows)


def summary(family: str, outcomes: dict[str, str]) -> str:
    """Return a line of the table of results: tests attempted, passed and skipped, and failures by kind."""
    known = declared(family)
    counts = [len(outcomes)] + [sum(x == wanted for x in outcomes.values()) for wanted in ("passed", "skipped")]
    for kind in (MACHINERY, DIFFERENCE, ALIKE):
        counts.append(sum(x == "failed" and test in known and known[test].kind == kind for test, x in outcomes.items()))
    counts.append(sum(x == "failed" and test not in known for test, x in outcomes.items()))
    return f"{family:8}" + "".join(f"{count:>12}" for count in counts)


HEADER = f"{'':8}" + "".join(
    f"{name:>12}" for name in ("attempted", "passed", "skipped", "machinery", "differences", "alike", "undeclared")
)
