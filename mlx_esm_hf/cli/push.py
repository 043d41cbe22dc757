"""mlx-esm push"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_esm_hf.cli.running import stderr, told

if TYPE_CHECKING:
    from mlx_esm_hf.hub import Publication


def command(
    folder: Annotated[Path, typer.Argument(help="A folder with a checkpoint.", exists=True, file_okay=False)],
    repo: Annotated[str, typer.Argument(help="owner/name, or a name under your own.")],
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload model",
    private: Annotated[bool, typer.Option("--private", help="Let a new repository be private.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", "--branch", help="The branch; it is made if it is not there.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    base_model: Annotated[str | None, typer.Option(help="What it was made from, for the card.")] = None,
    license: Annotated[str | None, typer.Option(help="Such as mit, for the card; by default the base model's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Send nothing, list what would go.")] = False,
) -> None:
    """Publish a checkpoint on the Hub: weights, config, tokenizer and a model card, in one commit.

    The account is that of `hf auth login`, or of the token in HF_TOKEN. A README.md in the folder is the card, else one
    that somebody wrote in the repository; else a card is written. If it is stopped, the same command sends only what is
    missing.

    Example: mlx-esm push my-model me/my-model --base-model facebook/esm2_t12_35M_UR50D
    """
    with told(stderr(), lambda: "Stopped. The same command sends only what is missing."):
        from mlx_esm_hf.hub import publish

        publication = publish(
            folder,
            repo,
            commit_message=message,
            private=private or None,
            revision=revision,
            create_pr=create_pr,
            base_model=base_model,
            license=license,
            dry_run=dry_run,
        )
    for line in listing(publication):
        typer.echo(line)


def listing(publication: Publication) -> list[str]:
    """What is published, left out and deleted, a file a line, and where it is."""
    lines = [f"{size:>15,}  {name}" for name, size in publication.files.items()]
    if publication.kept_card:
        lines.append(f"{'stays':>15}  README.md")
    lines += [f"{'deleted':>15}  {name}" for name in publication.deleted]
    lines += [f"{'left out':>15}  {name}: {why}" for name, why in publication.left_out.items()]
    if not publication.tokenizer:
        lines.append(f"{'lacking':>15}  a tokenizer: tokenizer.save_pretrained puts it into the folder")
    total = f"{sum(publication.files.values()):,} bytes in {len(publication.files)} files"
    if publication.commit is None:
        return [*lines, f"{total} would go to {publication.repo_id}. Nothing was sent."]
    return [*lines, f"{total}: {publication.commit.pr_url or publication.commit.commit_url}"]
