"""transformers' common tests of models and configs, run on our classes (long).

Source: tests/test_modeling_common.py and tests/test_configuration_common.py of transformers' source distribution.
"""

from __future__ import annotations

import unittest
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.common import sources
from tests.common.adapter import Adapter, adapter_of
from tests.common.declared import HEADER, declared, summary, table
from tests.common.families import FAMILIES, ModelTester

CONFIG_TESTS = (
    "create_and_test_config_common_properties",
    "create_and_test_config_to_json_string",
    "create_and_test_config_to_json_file",
    "create_and_test_config_from_and_save_pretrained",
    "create_and_test_config_from_and_save_pretrained_subfolder",
    "create_and_test_config_from_and_save_pretrained_composite",
    "create_and_test_config_from_pretrained_custom_kwargs",
    "create_and_test_config_with_num_labels",
    "check_config_can_be_init_without_params",
    "check_config_arguments_init",
)


class Outcomes(unittest.TestResult):
    """Collect the outcome of each test: "passed", "skipped" or "failed"; subtests count for their test."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: dict[str, str] = {}
        self.details: dict[str, str] = {}

    def stopTest(self, test: Any) -> None:
        self.outcomes.setdefault(test._testMethodName, "passed")

    def _add(self, test: Any, outcome: str, detail: str) -> None:
        name = getattr(test, "test_case", test)._testMethodName
        if self.outcomes.get(name) != "failed":
            self.outcomes[name] = outcome
            self.details[name] = detail

    def addSkip(self, test: Any, reason: str) -> None:
        self._add(test, "skipped", reason)

    def addFailure(self, test: Any, error: Any) -> None:
        self._add(test, "failed", self._exc_info_to_string(error, test))

    def addError(self, test: Any, error: Any) -> None:
        self.addFailure(test, error)

    def addSubTest(self, test: Any, subtest: Any, error: Any) -> None:
        if error is not None:
            self.addFailure(subtest, error)


def case_of(name: str, modeling: Any, configuration: Any) -> type[unittest.TestCase]:
    """Return the test case of a family: all common tests."""
    family = FAMILIES[name]

    def set_up(self: Any) -> None:
        sources.set_seed(0)
        self.model_tester = ModelTester(family)
        self.config_tester = configuration.ConfigTester(self, family.config_class, **family.fields)

    members: dict[str, Any] = {
        "setUp": set_up,
        "assertRaisesRegex": assert_raises,
        "all_model_classes": tuple(map(adapter_of, family.classes)),
        **family.settings,
    }
    for method in CONFIG_TESTS:

        def test(self: Any, method: str = method) -> None:
            getattr(self.config_tester, method)()

        members[f"test_config_{method.partition('_config_')[2]}"] = test
    return type(f"{name}Test", (modeling.ModelTesterMixin, unittest.TestCase), members)


def assert_raises(self: Any, error: Any, pattern: Any) -> Any:
    """Compare the type of an error only: our messages have other words."""
    return self.assertRaises(error)


def run(name: str, modeling: Any, configuration: Any, tests: Any = None) -> Outcomes:
    """Run the common tests of a family, or only `tests`."""
    case = case_of(name, modeling, configuration)
    outcomes = Outcomes()
    names = unittest.defaultTestLoader.getTestCaseNames(case) if tests is None else sorted(tests)
    with warnings.catch_warnings():
        unittest.TestSuite(map(case, names)).run(outcomes)
    return outcomes


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("common")
    return sources.load(sources.download(folder), folder)


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_common(name: str, modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly the declared tests fail; some of them pass if the weights of a new model count as loaded."""
    found = run(name, *modules)
    failed = {test for test, outcome in found.outcomes.items() if outcome == "failed"}
    known = declared(name)
    print(HEADER, summary(name, found.outcomes), sep="\n")
    assert not failed - known.keys(), "\n".join(found.details[test] for test in sorted(failed - known.keys()))
    assert failed == known.keys(), f"these tests pass and must not be declared: {known.keys() - failed}"

    monkeypatch.setattr(Adapter, "loaded", True)
    again = run(name, *modules, tests=[test for test, failure in known.items() if failure.passes_loaded])
    assert set(again.outcomes.values()) <= {"passed"}, again.details


def test_the_documentation_lists_the_failures() -> None:
    page = (Path(__file__).parents[2] / "docs" / "testing.md").read_text(encoding="utf-8")
    assert table() in page
