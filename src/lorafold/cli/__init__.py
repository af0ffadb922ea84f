"""The `lorafold` command: a table of commands, each in a module that is imported when it is called.

An error that the user can put right is one line on stderr, with exit code 2. Ctrl-C has exit code
130. Any other exception is a defect and shows its traceback.
"""

import importlib
import importlib.metadata
import logging
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from lorafold.cli.command_line import words
from lorafold.cli.help import OTHERS, HelpAll, write_examples, write_lists
from lorafold.cli.parser import Above, Command, CommandGroup
from lorafold.cli.suggestions import no_options
from lorafold.errors import Interrupted, LorafoldError
from lorafold.runtime.process_tuning import imports_set_aside, restart_tuned
from lorafold.runtime.processes import Launched, launched

# The function of each is `verb_of` its name; the text is its line in `lorafold --help`.
GROUPS = {
    "Train": {
        "quickstart": "The whole story on the embedded model, in minutes, offline.",
        "train": "Train one adapter on your data.",
    },
    "Use": {
        "generate": "Complete one prompt.",
        "chat": "Talk to the base and its adapters in the terminal.",
        "serve": "Serve a base and its adapters: OpenAI's API, and a page.",
        "merge": "Fold adapters into their base: a plain model, certified.",
        "export": "Write adapters for another engine, and prove them there.",
    },
    "Measure": {
        "eval": "Loss, perplexity, exact match or rewards, with intervals.",
        "score": "Score rows with a reward model.",
        "inspect": "An adapter's rank, relation to the base, and tokens.",
        "history": "The run that wrote an adapter: curves and completions.",
        "compare": "Train and measure every method on your model and data.",
        "intrinsic": "Search for the intrinsic dimension of a task.",
        "fragility": "How few benign examples undo an adapter's behaviour.",
    },
    "Shape": {
        "compose": "Make one adapter from several.",
        "resize": "Give an adapter another rank.",
        "extract": "Make an adapter of a fine-tuned model and its base.",
    },
    "Tools": {
        "estimate": "The memory that a run takes, and whether it fits a device.",
        "recipe": "Translate a file of axolotl, TRL, PEFT, Unsloth and others.",
        "cache": "List or clear what lorafold keeps on the disk.",
        "doctor": "What is wrong here, and what would be slow.",
    },
}
# commands that are no verbs of Python, each with its file here and its function
TOOLS = {
    "quickstart": ("other_commands", "quickstart"),
    "recipe": ("other_commands", "recipe"),
    "cache": ("cache", "cache"),
    "doctor": ("other_commands", "doctor"),
    "serve new-key": ("other_commands", "new_key"),
}
# verbs whose function has another name than its command or its file in api
FUNCTIONS = {"eval": ("evaluate", "evaluate"), "extract": ("resize", "extract")}
COMMANDS = {name: line for group in GROUPS.values() for name, line in group.items()}
EXAMPLES = (
    "lorafold quickstart --out demo",
    'lorafold generate demo/adapter --prompt "a table for two at Noma at 7pm"',
    "lorafold train --data demo/train.jsonl --out adapter",
)
TRAINING = {"quickstart", "train", "compare", "intrinsic", "fragility"}
SEVERAL = {"train", "doctor"}  # which several processes may be started of


class Commands(CommandGroup):
    """A group that lists COMMANDS in --help and imports a command's module when it is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands.update(
            {name: TyperCommand(name, short_help=line) for name, line in COMMANDS.items()}
        )
        help_all: Any = self.params[-1]
        help_all.hidden = True  # it has nothing more

    def help_all(self, ctx: Any) -> str:
        """The help, which leaves nothing to another one."""
        return self.get_help(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read what comes before the command. LorafoldError for unknown options."""
        try:
            return super().parse_args(ctx, [*args])  # which it empties
        except typer.TyperException as error:
            options = {n: p for p in self.get_params(ctx) for n in (*p.opts, *p.secondary_opts)}
            typed = words(args, options, interspersed=False)
            raise no_options(typed, options, "lorafold") or error from None

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a first run, the commands by group, and the options."""
        write_examples(formatter, EXAMPLES, "A first run")
        wide = max(map(len, COMMANDS))
        titled = {t: [(f"{n:<{wide}}", line) for n, line in g.items()] for t, g in GROUPS.items()}
        write_lists(formatter, titled)
        records = [one.get_help_record(ctx) for one in self.get_params(ctx)]
        write_lists(formatter, {OTHERS: [record for record in records if record is not None]})

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The name of the command, the command itself, and its arguments."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, _load(str(name)), rest


def verb_of(name: str) -> Any:
    """The function that declares a command."""
    if name in TOOLS:
        file, function = TOOLS[name]
        return getattr(importlib.import_module(f"lorafold.cli.{file}"), function)
    file, function = FUNCTIONS.get(name, (name, name))
    return getattr(importlib.import_module(f"lorafold.api.{file}"), function)


def _load(name: str) -> Any:
    from lorafold.cli import commands
    from lorafold.cli.runners import RUNNERS

    def built(name: str, above: bool = False) -> commands.BuiltCommand:
        return commands.built(verb_of(name), RUNNERS.get(name, commands.plain), above)

    one = typer.Typer(add_completion=False, rich_markup_mode=None)
    below = {whole.partition(" ")[2]: built(whole) for whole in TOOLS if f"{name} " in whole}
    main = built(name, above=bool(below))
    if below:
        one.callback(cls=Above, invoke_without_command=True)(main.function)
        for inner, command in below.items():
            one.command(inner, cls=Command)(command.function)
    else:
        one.command(name, cls=Command, epilog=main.notes or None)(main.function)
    made: Any = typer.main.get_command(one)
    made.examples = main.examples
    for inner, command in below.items():
        made.commands[inner].examples = command.examples
    return made


app = typer.Typer(
    cls=Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},  # of the commands too
)


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    help_all: HelpAll = False,
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
    here = Launched()
    try:
        here = launched()
        if not here.speaks:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the end
    except LorafoldError as error:
        sys.exit(_fail(str(error)))
    notices, told = logging.StreamHandler(), set[str]()
    notices.addFilter(lambda line: _is_new(line.getMessage(), told))
    logging.getLogger("lorafold").addHandler(notices)
    logging.getLogger("lorafold").setLevel(logging.INFO)
    try:
        _check_alone(here, *sys.argv[1:2])
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
    except Exception:
        sys.stderr = sys.__stderr__  # a defect of any process
        raise
    sys.exit(code)


def _check_alone(here: Launched, command: str = "") -> None:
    """Raise LorafoldError where a launcher started several processes of a command for one."""
    if here.world > 1 and command in COMMANDS.keys() - SEVERAL:
        raise LorafoldError(
            f"lorafold {command}: {here.by} started {here.world} processes, expected one: start it"
            " alone; lorafold train computes with several"
        )


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
