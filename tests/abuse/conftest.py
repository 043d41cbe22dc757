import pytest

from tests.abuse.command import CASES, Inputs, contents, done, file_operations, run


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session", params=CASES)
def case(request):
    """A job with a format."""
    return request.param


@pytest.fixture(scope="session")
def whole(case, inputs, tmp_path_factory):
    """What a run of the case writes that nobody disturbs, and how many file operations that takes."""
    folder = tmp_path_factory.mktemp("whole")
    code, said = run(inputs.command(case, folder))
    assert code == done(case), said
    return contents(folder), file_operations(said)
