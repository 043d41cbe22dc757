"""Publishing a checkpoint to the Hub in one commit, so that the repository gets all of it or none."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from mlx_esm_hf.checkpoint.hub_errors import hub_error
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.hub.card import is_generated, load_card, write_card
from mlx_esm_hf.hub.files import CARD, TOKENIZER, Checkpoint, read_checkpoint, variant_of
from mlx_esm_hf.version import __version__


@dataclass(frozen=True)
class Publication:
    """What was published, or what would be.

    Attributes:
        repo_id: id of the repository, with its owner.
        files: {name: bytes} of the published files. Files that the repository already has are not sent.
        left_out: {name: reason} of the files in the folder that are not published.
        deleted: weights of an earlier checkpoint, deleted in the same commit.
        kept_card: whether the repository keeps the card that it has.
        tokenizer: whether the repository has a tokenizer afterwards.
        reached: whether the repository was read. In a dry run without a network or a login its contents are unknown.
        commit: the commit; None if nothing was sent.
    """

    repo_id: str
    files: dict[str, int]
    left_out: dict[str, str]
    deleted: list[str]
    kept_card: bool
    tokenizer: bool
    reached: bool = True
    commit: CommitInfo | None = None


@dataclass(frozen=True)
class Head:
    """The current state of a repository: its last commit and file names; (None, []) if it does not exist."""

    commit: str | None
    files: list[str]


def publish(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
    base_model: str | None = None,
    license: str | None = None,
    dry_run: bool = False,
) -> Publication:
    """Publish the checkpoint in a folder: weights, config, tokenizer and a card, in one commit.

    Weights of an earlier checkpoint that are no longer used are deleted in the same commit. After a failure, call it
    again: large files that were uploaded are not sent again. The card is the `README.md` in the folder; otherwise a
    card in the repository that was edited by hand is kept; otherwise a card is written.

    Args:
        folder: the folder with the checkpoint.
        repo_id: "owner/name", or "name" for a repository of the user of the token.
        commit_message: by default "Upload model".
        commit_description: body of the commit message.
        private: make a new repository private. An existing repository is not changed, and refused if it is public.
        token: access token; by default that of `hf auth login` or `HF_TOKEN`.
        revision: the branch to commit to. It is created if it does not exist.
        create_pr: open a pull request instead of committing to the branch.
        tags: additional tags of the card.
        base_model: id of the model that this one was made from, for the card.
        license: the Hub's name of the license for the card, such as "mit"; by default that of the base model.
        dry_run: return what would be published, and send nothing. The repository is read if the Hub can be reached.

    Returns:
        What was published.

    Raises:
        CheckpointError: the folder contains no complete checkpoint. Nothing was sent.
        ValueError: the id is not valid, `private` was passed for a public repository, or the Hub refused the
            metadata of the card.
        OSError: the Hub refused or did not respond.
    """
    checkpoint = read_checkpoint(folder)
    api = HfApi(token=token, library_name="mlx-esm-hf", library_version=__version__)
    try:
        reached = True
        if dry_run:
            repo_id, head, reached = look_up(api, repo_id, revision)
        else:
            repo_id = prepare(api, repo_id, private, revision, create_pr)
            head = branch_head(api, repo_id, revision, missing_ok=False)
        if reached:
            license = license or license_of(api, base_model)
        tokenizer = any(name in TOKENIZER for name in [*checkpoint.files, *head.files])
        facts: dict[str, Any] = {"tokenizer": tokenizer, "base_model": base_model, "license": license}
        card = choose_card(api, checkpoint, repo_id, head, tags, facts)
        additions = {name: CommitOperationAdd(name, checkpoint.folder / name) for name in checkpoint.files}
        if card is not None:
            additions[CARD] = CommitOperationAdd(CARD, str(card).encode())
        publication = Publication(
            repo_id,
            files={name: addition.upload_info.size for name, addition in additions.items()},
            left_out=checkpoint.left_out,
            deleted=stale(head, checkpoint),
            kept_card=CARD not in additions,
            tokenizer=tokenizer,
            reached=reached,
        )
        if dry_run:
            return publication
        commit = api.create_commit(
            repo_id,
            [*additions.values(), *(CommitOperationDelete(name) for name in publication.deleted)],
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head.commit,
        )
    except (HTTPError, RuntimeError) as error:
        raise hub_error(error, f"{Path(folder)} was not published as {repo_id}", repo_id, revision) from error
    except ValueError as error:
        raise UserError(f"{Path(folder)} was not published as {repo_id}: {error}") from error
    return Publication(**{**vars(publication), "commit": commit})


def look_up(api: HfApi, repo_id: str, revision: str | None) -> tuple[str, Head, bool]:
    """Return the id with its owner, the current state of the branch, and whether it was read.

    Without a network, or without a login if there is no owner, the id is unchanged and the repository counts as empty.
    """
    try:
        repo_id = with_owner(api, repo_id)
        return repo_id, branch_head(api, repo_id, revision, missing_ok=True), True
    except HfHubHTTPError:
        raise
    except (HTTPError, ConnectionError, LocalTokenNotFoundError):  # no connection, HF_HUB_OFFLINE, or no login
        validate_repo_id(repo_id)
        return repo_id, Head(None, []), False


def with_owner(api: HfApi, repo_id: str) -> str:
    """Return the id of a repository with its owner, which by default is the user of the token."""
    return repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"


def prepare(api: HfApi, repo_id: str, private: bool | None, revision: str | None, create_pr: bool) -> str:
    """Create the repository and the branch if they do not exist. Return the id with its owner."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise UserError(f"{repo_id} already exists and is public. Nothing was sent; choose another name.")
    if revision is not None and not revision.startswith("refs/pr/"):
        try:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        except HfHubHTTPError as error:
            # A user who may only open pull requests cannot create a branch. The commit fails if it does not exist.
            if not (create_pr and error.response.status_code == 403):
                raise
    return repo_id


def branch_head(api: HfApi, repo_id: str, revision: str | None, missing_ok: bool) -> Head:
    """Return the last commit of a branch and its files.

    With `missing_ok`, a branch that does not exist counts as main, from which it would be created, and a repository
    that does not exist counts as empty.
    """
    try:
        info = api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        if not missing_ok or revision is None:
            raise
        return branch_head(api, repo_id, None, missing_ok)
    except RepositoryNotFoundError:
        if not missing_ok:
            raise
        return Head(None, [])
    return Head(info.sha, [sibling.rfilename for sibling in info.siblings or []])


def license_of(api: HfApi, base_model: str | None) -> str | None:
    """Return the license in the card of a model on the Hub; None if it has none or cannot be read."""
    if base_model is None:
        return None
    try:
        card: Any = api.model_info(base_model).card_data
    except (HTTPError, OSError, ValueError):
        return None
    return card.license if card is not None else None


def choose_card(
    api: HfApi,
    checkpoint: Checkpoint,
    repo_id: str,
    head: Head,
    tags: list[str] | None,
    facts: dict[str, Any],
) -> ModelCard | None:
    """Return the card to send; None if that of the folder or the repository is used unchanged.

    Args:
        api: the Hub.
        checkpoint: the checkpoint.
        repo_id: id of the repository.
        head: current state of the repository.
        tags: additional tags.
        facts: arguments of `write_card`.
    """
    if CARD in checkpoint.files:
        card = load_card(checkpoint.folder / CARD)
    elif CARD in head.files:
        card = load_card(api.hf_hub_download(repo_id, CARD, revision=head.commit))
        if is_generated(card):
            return write_card(checkpoint, repo_id, tags=tags, earlier=card, **facts)
    else:
        return write_card(checkpoint, repo_id, tags=tags, **facts)
    if set(tags or []) <= set(card.data.tags or []):
        return None
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *(tags or [])]))
    return card


def stale(head: Head, checkpoint: Checkpoint) -> list[str]:
    """Return weights in the repository that would be loaded instead of the checkpoint's, or that are no longer used."""
    variants = {variant_of(name) for name in checkpoint.files} - {None}
    return [name for name in head.files if variant_of(name) in variants and name not in checkpoint.files]


def hub_id(name_or_path: str | None) -> str | None:
    """Return the repository id that a model was loaded from; None if it was a folder or nothing."""
    name = name_or_path or ""
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".") and not os.path.exists(name)
    return name if is_id else None
