"""The command line, `arcflow`: each command parses, imports its worker, calls it and prints.

Workers are imported where they are called, so that `--help` does not wait for JAX.
"""

from __future__ import annotations

from collections.abc import Sequence

import typer

from arcflow_jax.cli import evaluate, exchange, reports, sample, train
from arcflow_jax.errors import told_in_a_line

app = typer.Typer(
    help="ArcFlow in JAX: distils large text-to-image models into 2-step generators.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
# Commands that take overrides of a recipe, --config.KEY=VALUE
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

app.command()(exchange.convert)
app.command(context_settings=OVERRIDES)(train.train)
app.command(context_settings=OVERRIDES)(train.embed_prompts)
app.command()(sample.sample)
app.add_typer(evaluate.app, name="evaluate")
app.command()(exchange.export)
app.command(context_settings=OVERRIDES)(reports.compile_report)
app.command()(reports.demo)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: with 0, with 2 and one line on stderr for what a user can put right."""
    with told_in_a_line():
        app(arguments)
