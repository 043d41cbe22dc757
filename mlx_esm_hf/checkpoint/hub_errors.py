"""What went wrong between here and the Hub, in a sentence."""

from __future__ import annotations

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# What to do about a status that the Hub answers with.
ADVICE = {
    401: "there is no token, or it is not valid: log in (`hf auth login`) or pass one",
    403: "the token may not do that: it was made for less (for reading only, say), or the place is someone else's",
    412: "the repository has changed meanwhile: do it again",
    416: "do it again, the download begins anew",
    429: "too many requests: wait some minutes, then do it again",
}


def hub_error(error: Exception, what: str, repo_id: str, revision: str | None = None) -> OSError:
    """What went wrong with the Hub, and what to do about it.

    Args:
        error: what huggingface_hub raised; the reason may be what it was raised from.
        what: was asked for or sent, to begin the sentence with.
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
        broken = next(e for e in reasons if isinstance(e, HTTPError))
        advice = (
            f"the connection to {place} failed ({broken or type(broken).__name__}). Try again: what is whole is kept"
        )
    else:
        advice = " ".join(str(error).split())
    return OSError(f"{what}: {advice.rstrip('.')}.")


def causes(error: BaseException | None) -> list[BaseException]:
    """An error, and those that it was raised from."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def status_of(error: HfHubHTTPError) -> str:
    """The status that the Hub answered with, its own words and what to do, in one line."""
    status = error.response.status_code
    said = error.server_message or error.response.reason_phrase
    advice = ADVICE.get(status, "it is in trouble: do it again later" if status >= 500 else "")
    return f"{status} ({' '.join(said.split())})" + (f": {advice}" if advice else "")
