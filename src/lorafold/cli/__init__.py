"""The `lorafold` command: a table of commands, each in a module that is imported when it is called.

An error that the user can put right is one line on stderr, with exit code 2. Ctrl-C has exit code
130. Any other exception is a defect and shows its traceback.
"""

import importlib
import importlib.metadata
import logging
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from lorafold.cli.groups import Above, Command
from lorafold.errors import Interrupted, LorafoldError
from lorafold.machine.collection import imports_set_aside
from lorafold.machine.restart import restart_tuned

# The function of each is lorafold.cli.<name>.command; the text is its line in `lorafold --help`.
COMMANDS = {
    "quickstart": "Train, evaluate, inspect and merge an adapter of the embedded model.",
    "train": "Train one adapter on your data.",
    "eval": "Measure loss, perplexity and exact match, with confidence intervals.",
    "score": "Score rows with a reward model, and measure how well it tells preferences.",
    "generate": "Complete one prompt.",
    "serve": "Serve a base and its adapters over an OpenAI-compatible API, with a page.",
    "chat": "Talk to the model in the terminal, and switch between the base and its adapters.",
    "merge": "Fold adapters into their base and certify the difference in output.",
    "estimate": "Estimate memory from a model's configuration, and whether it fits a device.",
    "compose": "Make one adapter from several and measure the interference of their tasks.",
    "history": "Show the run that wrote an adapter: curves, held-out figures, completions.",
    "inspect": "Measure an adapter: effective rank, relation to the base, tokens it changes.",
    "resize": "Give an adapter another rank.",
    "extract": "Make an adapter of the difference between a fine-tuned model and its base.",
    "intrinsic": "Search for the intrinsic dimension of a task.",
    "compare": "Train and measure every method on your model and data.",
    "fragility": "Measure how few benign examples undo a behaviour that lives in an adapter.",
    "recipe": "Translate a configuration of axolotl, LLaMA-Factory, TRL or PEFT into a recipe.",
    "cache": "List or clear what lorafold keeps: models, rows, tokens.",
    "doctor": "Examine this machine and installation: what is wrong, what would be slow.",
}
TRAINING = {"quickstart", "train", "compare", "intrinsic", "fragility"}


class Commands(TyperGroup):
    """A group that lists COMMANDS in --help and imports a command's module when it is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands.update(
            {name: TyperCommand(name, short_help=line) for name, line in COMMANDS.items()}
        )

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The name of the command, the command itself, and its arguments."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, _load(str(name)), rest


def _load(name: str) -> Any:
    module = importlib.import_module(f"lorafold.cli.{name}")
    one = typer.Typer(add_completion=False, rich_markup_mode=None)
    below = getattr(module, "BELOW", {})  # commands of a command
    if below:
        one.callback(cls=Above, invoke_without_command=True)(module.command)
        for inner, place in below.items():
            function = importlib.import_module(f"lorafold.cli.{place}").command
            one.command(inner, cls=Command)(function)
    else:
        one.command(name, cls=Command, epilog=getattr(module, "EPILOG", None))(module.command)
    return typer.main.get_command(one)


app = typer.Typer(cls=Commands, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Low-rank adapters of transformer models: train, measure, fold.

    `lorafold COMMAND --help` describes a command and its options.
    """
    if version:
        typer.echo(f"lorafold {importlib.metadata.version('lorafold')}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
    else:
        return
    raise typer.Exit


def main() -> None:
    """Run the command line and exit with its code."""
    if TRAINING.intersection(sys.argv[1:2]):
        restart_tuned()
    notices, told = logging.StreamHandler(), set[str]()
    notices.addFilter(lambda line: _is_new(line.getMessage(), told))
    logging.getLogger("lorafold").addHandler(notices)
    logging.getLogger("lorafold").setLevel(logging.INFO)
    try:
        with imports_set_aside():
            code = app(prog_name="lorafold", standalone_mode=False)
    except LorafoldError as error:
        code = _fail(str(error))
    except Interrupted as stop:
        typer.echo(str(stop), err=True)
        code = stop.code
    except typer.TyperException as error:
        code = _fail(f"{error.format_message().removesuffix('.')}; see {_help_of(error)}")
    except KeyboardInterrupt:
        code = 130
    except OSError as error:
        code = _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    sys.exit(code)


def _is_new(line: str, told: set[str]) -> bool:
    """Whether a notice was not printed yet, since a command may load an adapter more than once."""
    new = line not in told
    told.add(line)
    return new


def _fail(message: str) -> int:
    typer.echo("error: " + " ".join(line.strip() for line in message.splitlines()), err=True)
    return 2


def _help_of(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)  # a usage error knows its command
    return f"{context.command_path if context else 'lorafold'} --help"
