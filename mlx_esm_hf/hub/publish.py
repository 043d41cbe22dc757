"""A checkpoint to the Hub, in one commit: the repository is as it was before, or holds all of it."""

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
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

from mlx_esm_hf.checkpoint.hub_errors import hub_error
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.hub.card import is_generated, load_card, write_card
from mlx_esm_hf.hub.files import CARD, TOKENIZER, Checkpoint, read_checkpoint, variant_of
from mlx_esm_hf.version import __version__


@dataclass(frozen=True)
class Publication:
    """What was published, or would be.

    Attributes:
        repo_id: with its owner.
        files: {name: bytes} of the files that the repository holds then; those that it holds already are not sent.
        left_out: {name: why} of the files of the folder that are not published.
        deleted: weights of an earlier checkpoint, which go in the same commit.
        kept_card: whether the repository has a card already, which stays.
        tokenizer: whether the repository has a tokenizer then.
        commit: None if nothing was sent.
    """

    repo_id: str
    files: dict[str, int]
    left_out: dict[str, str]
    deleted: list[str]
    kept_card: bool
    tokenizer: bool
    commit: CommitInfo | None = None


@dataclass(frozen=True)
class Head:
    """A repository as it is now: its last commit and the names of its files; (None, []) if there is none."""

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

    Weights of an earlier checkpoint that the new one does not name are deleted in the same commit. If it breaks, it can
    be done again: large files that have arrived are not sent again. A `README.md` in the folder is the card; else one
    that somebody wrote in the repository stays; else a card is written.

    Args:
        repo_id: "owner/name", or "name" under the name of the user whose token it is.
        private: make a new repository private. One that is there stays as it is, and is refused if it is public.
        token: of the user; by default that of `hf auth login`, or `HF_TOKEN`.
        revision: the branch to commit to; it is made if it is not there.
        create_pr: open a pull request instead of committing to the branch.
        tags: further ones for the card.
        base_model: the id of the model that this one was made from, for the card.
        license: the Hub's name of it, such as "mit", for the card; by default that of the base model.
        dry_run: send nothing, and say what would be sent. The repository is looked at.

    Raises:
        CheckpointError: the folder holds no whole checkpoint; nothing was sent.
        ValueError: an id that none can have, `private` for a repository that is public, or a card whose metadata the
            Hub refuses.
        OSError: the Hub refused, or did not answer.
    """
    checkpoint = read_checkpoint(folder)
    api = HfApi(token=token, library_name="mlx-esm-hf", library_version=__version__)
    try:
        repo_id = with_owner(api, repo_id) if dry_run else prepare(api, repo_id, private, revision, create_pr)
        head = branch_head(api, repo_id, revision, missing_ok=dry_run)
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


def with_owner(api: HfApi, repo_id: str) -> str:
    """The id that a name without an owner becomes: that under the user's own name."""
    return repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"


def prepare(api: HfApi, repo_id: str, private: bool | None, revision: str | None, create_pr: bool) -> str:
    """Let there be a repository with this branch; returns its id with its owner."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise UserError(f"{repo_id} is there already, and it is public: nothing was sent. Take another name for it.")
    if revision is not None and not revision.startswith("refs/pr/"):
        try:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        except HfHubHTTPError as error:
            # Who may only propose changes cannot make a branch; whether it is there turns out with the commit.
            if not (create_pr and error.response.status_code == 403):
                raise
    return repo_id


def branch_head(api: HfApi, repo_id: str, revision: str | None, missing_ok: bool) -> Head:
    """The last commit of a branch. With `missing_ok` a branch that is not there is what it would be made from: main."""
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
    """What the card of a model on the Hub says; None where it says nothing, or cannot be asked."""
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
    """The card to send; None where the folder's own goes as it is, or the repository's stays as it is.

    Args:
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
    """Weights in the repository that would be read instead of the checkpoint's, or that nothing names any more."""
    variants = {variant_of(name) for name in checkpoint.files} - {None}
    return [name for name in head.files if variant_of(name) in variants and name not in checkpoint.files]


def hub_id(name_or_path: str | None) -> str | None:
    """What a model was loaded from, if that is a repository with an owner and not a folder."""
    name = name_or_path or ""
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".") and not os.path.exists(name)
    return name if is_id else None
