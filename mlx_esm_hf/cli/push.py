"""The command `mlx-esm push`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_esm_hf.cli.running import reporting_errors
from mlx_esm_hf.demo import NAME, demo_model
from mlx_esm_hf.errors import UserError

if TYPE_CHECKING:
    from mlx_esm_hf.hub import Publication


def command(
    folder: Annotated[
        Path, typer.Argument(help="Folder with a checkpoint; demo is the bundled model, if no folder has this name.")
    ],
    repo: Annotated[str, typer.Argument(help="owner/name, or a name in your own namespace.")],
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload model",
    private: Annotated[bool, typer.Option("--private", help="Create a new repository as private.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", "--branch", help="Branch to push to; created if it does not exist.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the base model, for the model card.")] = None,
    license: Annotated[
        str | None, typer.Option(help="Licence for the model card, such as mit. Default: the base model's.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Upload nothing; list what would be uploaded.")] = False,
) -> None:
    """Publish a checkpoint on the Hub: weights, config, tokenizer and a model card, in one commit.

    Uses the account of `hf auth login` or the token in HF_TOKEN. A README.md in the folder becomes the model card; if
    there is none, a hand-written card in the repository is kept; otherwise a card is generated. Run the same command
    again to continue an interrupted push.

    Example: mlx-esm push my-model me/my-model --base-model facebook/esm2_t12_35M_UR50D
    """
    with reporting_errors(lambda: "Stopped. Run the same command again to upload what is missing."):
        from mlx_esm_hf.hub import publish

        publication = publish(
            folder_to_push(folder),
            repo,
            commit_message=message,
            private=private or None,
            revision=revision,
            create_pr=create_pr,
            base_model=base_model,
            license=license,
            dry_run=dry_run,
        )
    for line in file_list(publication):
        typer.echo(line)


def folder_to_push(folder: Path) -> Path:
    """Return the folder with the checkpoint. Here, the user's own folder named `demo` precedes the bundled model.

    Raises:
        UserError: the folder does not exist.
    """
    if not folder.exists() and folder.name == str(folder) == NAME:
        return Path(demo_model())
    if not folder.is_dir():
        raise UserError(f"Folder {folder} not found. `push` publishes a folder such as one written by `convert`.")
    return folder


def file_list(publication: Publication) -> list[str]:
    """Return one line per file that is published, left out or deleted, and a line with the total and the address."""
    lines = [f"{size:>15,}  {name}" for name, size in publication.files.items()]
    if publication.kept_card:
        lines.append(f"{'unchanged':>15}  README.md")
    lines += [f"{'deleted':>15}  {name}" for name in publication.deleted]
    lines += [f"{'left out':>15}  {name}: {why}" for name, why in publication.left_out.items()]
    if not publication.reached:
        lines.append(f"{'unknown':>15}  what {publication.repo_id} contains: no network, or not logged in")
    if not publication.tokenizer:
        lines.append(f"{'missing':>15}  a tokenizer: add it with tokenizer.save_pretrained(folder)")
    total = f"{sum(publication.files.values()):,} bytes in {len(publication.files)} files"
    if publication.commit is None:
        return [*lines, f"{total} would be uploaded to {publication.repo_id}. Nothing was uploaded."]
    return [*lines, f"{total}: {publication.commit.pr_url or publication.commit.commit_url}"]
