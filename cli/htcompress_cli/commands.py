"""The command line: parse, call one library function, show. Heavy imports stand inside the commands."""

from __future__ import annotations

from typing import Annotated

import typer

from htcompress_cli import compression, exports, gate, studies

app = typer.Typer(
    name="htcompress",
    help="Compress trained recurrent networks into Hierarchical Tucker form.",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(version("htcompress"))
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for command in (
    compression.inspect,
    compression.init,
    compression.convert,
    compression.finetune,
    compression.evaluate,
    studies.sweep,
    studies.compare,
    gate.check,
    exports.export,
):
    app.command()(command)
