"""The `lorafold` command: a table of commands, each in its own module, imported when it is called.

What the user can put right is one line on stderr and exit code 2; Ctrl-C is 130; anything else is a
defect and shows its traceback.
"""

import importlib
import importlib.metadata
import logging
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from lorafold.cli.groups import Command
from lorafold.errors import Interrupted, LorafoldError
from lorafold.machine.restart import restart_tuned

COMMANDS = {  # lorafold.cli.<name>.command does it; this is its line in `lorafold --help`
    "quickstart": "The whole story on the embedded model: train, before and after, inspect, merge.",
    "train": "Train one adapter on your data.",
    "eval": "Loss, perplexity and exact match of a model or adapter, with confidence intervals.",
    "generate": "One answer to one prompt.",
    "chat": "A conversation in the terminal, switching between the base and its adapters.",
    "merge": "Fold an adapter into its base: a plain model, with a certificate of the output gap.",
    "estimate": "Will it fit? Memory by term, from a model's configuration alone.",
    "compose": "One adapter from many, with the interference between their tasks measured.",
    "inspect": (
        "What an adapter learnt: its true rank, its place in the base, what it reads and writes."
    ),
    "resize": "The best adapter of another rank.",
    "extract": "An adapter out of a fully fine-tuned model and its base.",
    "intrinsic": "How few numbers a task takes: its intrinsic dimension, by a resumable search.",
    "compare": "Every method on your model and data, measured in one table.",
    "recipe": "A recipe out of a configuration of axolotl, LLaMA-Factory or PEFT, with a report.",
    "doctor": "This machine and installation: what is wrong, and what would be slow here.",
}
TRAINING = {"quickstart", "train", "compare", "intrinsic"}


class Commands(TyperGroup):
    """Lists the table in --help, and imports a command's module only when that command is
    called.
    """

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands.update(
            {name: TyperCommand(name, short_help=line) for name, line in COMMANDS.items()}
        )

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)
        return name, _load(str(name)), rest


def _load(name: str) -> Any:
    module = importlib.import_module(f"lorafold.cli.{name}")
    one = typer.Typer(add_completion=False, rich_markup_mode=None)
    one.command(name, cls=Command, epilog=getattr(module, "EPILOG", None))(module.command)
    return typer.main.get_command(one)


app = typer.Typer(cls=Commands, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Low-rank adapters of transformer models: train, measure, fold.

    `lorafold COMMAND --help` tells more about a command.
    """
    if version:
        typer.echo(f"lorafold {importlib.metadata.version('lorafold')}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
    else:
        return
    raise typer.Exit


def main() -> None:
    """Run the command line and leave the process with its exit code."""
    if TRAINING.intersection(sys.argv[1:2]):
        restart_tuned()
    notices = logging.StreamHandler()
    logging.getLogger("lorafold").addHandler(notices)
    logging.getLogger("lorafold").setLevel(logging.INFO)
    try:
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


def _fail(message: str) -> int:
    typer.echo("error: " + " ".join(line.strip() for line in message.splitlines()), err=True)
    return 2


def _help_of(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)  # a usage error knows its command
    return f"{context.command_path if context else 'lorafold'} --help"
