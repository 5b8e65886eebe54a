"""`fifa rebuild`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("rebuild")
@click.argument("subset_json", type=click.Path(path_type=Path))
@click.option("--source", help="Where the source is now, if it has moved.")
@click.option(
    "--allow-download", is_flag=True, help="Fetch images that the source only names by a URL."
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The folder of the subset."
)
def command(subset_json: Path, source: str | None, allow_download: bool, out: Path) -> None:
    """Rebuild a subset from its subset.json.

    The source is read again; nothing is scored.
    """
    from fifa.selection.export import rebuild

    rebuild(subset_json, out, source=source, allow_download=allow_download)
    click.echo(out)
