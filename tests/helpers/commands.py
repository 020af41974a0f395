"""Commands of arcflow in documents and templates, parsed by the command line itself."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import typer

from arcflow_jax.cli.app import app


def commands(line: str) -> Iterator[list[str]]:
    """The arguments of each call of arcflow in a shell's line, also in a quoted one."""
    words = shlex.split(line, comments=True)
    for i, word in enumerate(words):
        if " " in word and "arcflow" in word:
            yield from commands(word)
        elif Path(word).name == "arcflow":
            rest = words[i + 1 :]
            yield rest[: next((j for j, end in enumerate(rest) if end in ("&&", "|", ";", "&")), len(rest))]


def command_of(arguments: list[str]) -> tuple[typer.core.TyperCommand, list[str]]:
    """The command that arguments name, and the rest of them. Fails if there is no such command."""
    command, rest = typer.main.get_command(app), list(arguments)
    while hasattr(command, "commands"):
        assert rest, f"arcflow {' '.join(arguments)} names no command"
        assert rest[0] in command.commands, f"arcflow {' '.join(arguments)}: no command {rest[0]}"
        command = command.commands[rest.pop(0)]
    return command, rest


def check_command(arguments: list[str]) -> None:
    """Fails on an unknown command or option, a missing option or a bad value."""
    command, rest = command_of(arguments)
    parsed = command.make_context(command.name, list(rest))
    unread = [*parsed.args, *getattr(parsed, "_protected_args", [])]
    assert all(text.startswith("--config.") for text in unread), unread
