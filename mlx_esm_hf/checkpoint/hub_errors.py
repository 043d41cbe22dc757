"""Errors of the Hub, explained in one sentence."""

from __future__ import annotations

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# What to do about an HTTP status of the Hub.
ADVICE = {
    401: "the token is missing or not valid: log in (`hf auth login`) or pass a token",
    403: "the token does not allow this: it may be read-only, or the repository belongs to another user",
    412: "the repository has changed in the meantime: try again",
    416: "try again; the download starts over",
    429: "too many requests: wait a few minutes, then try again",
}


def hub_error(error: Exception, what: str, repo_id: str, revision: str | None = None) -> OSError:
    """Return an OSError that says what failed on the Hub and what to do about it.

    Args:
        error: what huggingface_hub raised. The reason may be in the errors that caused it.
        what: what was requested or sent; begins the message.
        repo_id: the repository.
        revision: the branch, tag or commit that was requested.
    """
    place = constants.ENDPOINT
    reasons = causes(error)
    answer = next((e for e in reasons if isinstance(e, HfHubHTTPError)), None)
    if isinstance(answer, GatedRepoError):
        advice = (
            f"{repo_id} is gated: ask for access at {place}/{repo_id}, and log in (`hf auth login`) or pass a token"
        )
    elif isinstance(answer, RepositoryNotFoundError):
        advice = f"{place} has no repository {repo_id}, or it is private: log in (`hf auth login`) or pass a token"
    elif isinstance(answer, RevisionNotFoundError):
        advice = f"{repo_id} has no branch, tag or commit '{revision}'"
    elif answer is not None:
        advice = f"{place} answered {status_of(answer)}"
    elif any(isinstance(e, HTTPError) for e in reasons):
        failed = next(e for e in reasons if isinstance(e, HTTPError))
        advice = (
            f"the connection to {place} failed ({failed or type(failed).__name__}). Try again: complete files are kept"
        )
    else:
        advice = " ".join(str(error).split())
    return OSError(f"{what}: {advice.rstrip('.')}.")


def causes(error: BaseException | None) -> list[BaseException]:
    """Return an error and its chain of causes."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def status_of(error: HfHubHTTPError) -> str:
    """Return the HTTP status of the Hub's response, its message and what to do about it, in one line."""
    status = error.response.status_code
    message = error.server_message or error.response.reason_phrase
    advice = ADVICE.get(status, "the server has a problem: try again later" if status >= 500 else "")
    return f"{status} ({' '.join(message.split())})" + (f": {advice}" if advice else "")
