"""The command line, `arcflow`, with all its commands."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence

import typer

from arcflow_jax.cli import doctor, evaluate, exchange, reports, sample, serve, train, warm
from arcflow_jax.errors import UserError, one_line, report_errors

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
app.command()(exchange.quantize)
app.command(context_settings=OVERRIDES)(train.train)
app.command(context_settings=OVERRIDES)(train.embed_prompts)
app.command()(sample.sample)
app.command()(serve.serve)
app.command()(warm.warm)
app.add_typer(evaluate.app, name="evaluate")
app.command()(exchange.export)
app.command()(exchange.verify)
app.command(context_settings=OVERRIDES)(reports.compile_report)
app.command()(reports.demo)
app.command()(doctor.doctor)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: with 0 if all is done, or with `errors.exit_code`."""
    with report_errors(), devices_needed():
        app(arguments)


@contextlib.contextmanager
def devices_needed() -> Generator[None]:
    """Inside the `with` block, JAX that does not start, as JAX_PLATFORMS or a driver has it, raises UserError."""
    try:
        yield
    except RuntimeError as error:
        if "initialize backend" not in str(error):
            raise
        raise UserError(f"JAX finds no device: {one_line(error)}") from error
