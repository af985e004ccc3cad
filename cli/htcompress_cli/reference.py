"""The command line reference of the documentation, written from the commands themselves.

python -m htcompress_cli.reference > docs/reference.md
"""

from __future__ import annotations

import re
from inspect import cleandoc
from typing import Any

import typer.main

from htcompress_cli.commands import app


def reference() -> str:
    """The reference as Markdown."""
    group: Any = typer.main.get_command(app)
    parts = [
        "# Command line reference",
        "",
        "Written from the code by `python -m htcompress_cli.reference`. Every command has `--help`, which says the "
        "same. Numbers take k, m and g: `5k`, `1.5m`.",
    ]
    for name, command in group.commands.items():
        parts += ["", f"## {name}", "", _plain(command.help or "")]
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        words = [f"[{p.metavar}]" if not p.required else p.metavar for p in arguments]
        parts += ["", f"    htcompress {' '.join([name, *words, '[OPTIONS]'])}", "", "| | default | |", "|---|---|---|"]
        parts += [f"| `{p.metavar}` | {'needed' if p.required else ''} | {_cell(p.help)} |" for p in arguments]
        parts += [f"| {_names(p)} | {_default(p)} | {_cell(p.help)} |" for p in options]
    return "\n".join(parts) + "\n"


def _names(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    return names if option.is_flag else f"{names} `{option.metavar}`"


def _default(option: Any) -> str:
    if option.required:
        return "needed"
    if isinstance(option.show_default, str):
        return _cell(option.show_default)
    if any(option.default is none for none in (None, False, True)):
        return "yes" if option.default is True else ""
    return f"`{option.default}`"


def _plain(text: str) -> str:
    """Help without the marks of rich."""
    return cleandoc(re.sub(r"\\(?=\[)", "", text)).replace("[", r"\[")


def _cell(text: str | None) -> str:
    return _plain(text or "").replace("|", r"\|").replace("<", "&lt;").replace(">", "&gt;")


if __name__ == "__main__":
    print(reference(), end="")
