import pytest

from tests.abuse.command import CASES, Inputs, contents, file_operations, run, success_code


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session", params=CASES)
def case(request):
    """A job with an output format."""
    return request.param


@pytest.fixture(scope="session")
def undisturbed(case, inputs, tmp_path_factory):
    """The files that an undisturbed run of the case writes, and its number of file operations."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, printed = run(inputs.command(case, folder))
    assert code == success_code(case), printed
    return contents(folder), file_operations(printed)
