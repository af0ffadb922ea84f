"""The `lorafold` command, which imports the module of a command only when it is called.

An error that the user can fix is printed as one line on stderr, with exit code 2. Ctrl-C has exit
code 130. Any other exception is a bug and shows its traceback.
"""

import importlib
import importlib.metadata
import logging
import os
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from lorafold.cli.command_classes import Command, CommandGroup, CommandWithSubcommands
from lorafold.cli.command_line import split_words
from lorafold.cli.help import OTHER_OPTIONS, write_examples, write_lists
from lorafold.cli.suggestions import unknown_options
from lorafold.errors import WINDOWS, Interrupted, LorafoldError
from lorafold.runtime.process_tuning import imports_frozen, restart_tuned
from lorafold.runtime.processes import detect_launch

GROUPS = {
    "Start": {
        "quickstart": "A guided first run on the embedded model, offline, in minutes.",
        "doctor": "Check this machine and installation.",
    },
    "Train": {
        "train": "Train an adapter on your data.",
        "estimate": "Estimate the memory of a run, and whether it fits a device.",
        "recipe": "Convert a config of axolotl, TRL, PEFT, Unsloth and others.",
    },
    "Measure": {
        "eval": "Measure loss, exact match or rewards, with intervals.",
        "history": "Show an adapter's run: curves and completions.",
        "compare": "Train and compare methods on your model and data.",
    },
    "Use": {
        "chat": "Chat with the base model and its adapters in the terminal.",
        "serve": "Serve adapters over an OpenAI-compatible API, with a page.",
        "merge": "Merge adapters into their base model, with a report.",
        "export": "Write adapters for another engine, and verify them there.",
    },
    "Lab": {  # typed after `lab`
        "generate": "Complete one prompt.",
        "score": "Score rows with a reward model.",
        "inspect": "Analyse an adapter: rank, relation to the base, tokens.",
        "intrinsic": "Search for the intrinsic dimension of a task.",
        "fragility": "Measure how easily fine-tuning undoes an adapter.",
        "compose": "Combine several adapters into one.",
        "resize": "Change the rank of an adapter.",
        "extract": "Make an adapter from a fine-tuned model and its base.",
        "cache": "List or clear lorafold's cache.",
    },
}
LAB = "lab"  # the command that has those of the last group
# command -> its function in `cli_only`
OTHER_COMMANDS = {
    "quickstart": "quickstart",
    "recipe": "recipe",
    "cache": "cache",
    "doctor": "doctor",
    "serve new-key": "new_key",
}
COMMANDS = {name: line for group in GROUPS.values() for name, line in group.items()}
TYPED = {name: f"{LAB} {name}" if name in GROUPS["Lab"] else name for name in COMMANDS}
EXAMPLES = (
    "lorafold quickstart --out demo",
    "lorafold chat demo/adapter",
    "lorafold train --data demo/train.jsonl --out adapter",
)
TUNED_PROCESS = {"quickstart", "train", "compare", "intrinsic", "fragility"}
CTRL_C = 130  # the exit code
MULTI_PROCESS = {"train", "doctor"}  # may run in several processes


class Commands(CommandGroup):
    names = TYPED

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        is_lab = self.name == LAB
        self.groups = {t: group for t, group in GROUPS.items() if (t == "Lab") == is_lab}
        for name in GROUPS["Lab"] if is_lab else COMMANDS:  # without `lab`, as earlier versions
            hidden = not is_lab and name in GROUPS["Lab"]
            self.commands[name] = TyperCommand(name, short_help=COMMANDS[name], hidden=hidden)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, [*args])  # super() empties the list
        except typer.TyperException as error:
            options = {n: p for p in self.get_params(ctx) for n in (*p.opts, *p.secondary_opts)}
            typed = split_words(args, options, interspersed=False)
            raise unknown_options(typed, options, ctx.command_path) or error from None

    def format_options(self, ctx: Any, formatter: Any) -> None:
        if self.name != LAB:
            write_examples(formatter, EXAMPLES, "A first run")
        width, groups = max(map(len, COMMANDS)), self.groups.items()
        titled = {t: [(f"{n:<{width}}", line) for n, line in g.items()] for t, g in groups}
        write_lists(formatter, titled)
        records = (param.get_help_record(ctx) for param in self.get_params(ctx))
        write_lists(formatter, {OTHER_OPTIONS: [*filter(None, records)]})

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name == LAB else load_command(str(name)), rest


def function_of(name: str) -> Any:
    if name in OTHER_COMMANDS:
        return getattr(importlib.import_module("lorafold.cli.cli_only"), OTHER_COMMANDS[name])
    name = "evaluate" if name == "eval" else name
    return getattr(importlib.import_module(f"lorafold.api.{name}"), name)


def load_command(name: str) -> Any:
    from lorafold.cli import commands
    from lorafold.cli.command_handlers import RUNNERS

    def build(name: str, is_group: bool = False) -> commands.BuiltCommand:
        runner = RUNNERS.get(name, commands.print_result)
        return commands.build_command(function_of(name), runner, is_group)

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    paths = [path for path in OTHER_COMMANDS if f"{name} " in path]
    subcommands = {path.partition(" ")[2]: build(path) for path in paths}
    main_command = build(name, is_group=bool(subcommands))
    if subcommands:
        app.callback(cls=CommandWithSubcommands, invoke_without_command=True)(main_command.function)
        for subname, command in subcommands.items():
            app.command(subname, cls=Command)(command.function)
    else:
        app.command(name, cls=Command, epilog=main_command.notes or None)(main_command.function)
    click_command: Any = typer.main.get_command(app)
    click_command.examples = main_command.examples
    for subname, command in subcommands.items():
        click_command.commands[subname].examples = command.examples
    return click_command


app = typer.Typer(
    cls=Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},  # for all commands
)
lab = typer.Typer(cls=Commands, rich_markup_mode=None, help="Study and change adapters.")
app.add_typer(lab, name=LAB)


@lab.callback(invoke_without_command=True)
@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Low-rank adapters of transformer models: train, measure, merge, serve.

    `lorafold COMMAND --help` describes a command and its options. `lorafold lab --help` lists more
    commands, to study and change adapters: generate, score, inspect, compose, resize and others.
    """
    if version:
        typer.echo(f"lorafold {importlib.metadata.version('lorafold')}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
    else:
        return
    raise typer.Exit


def main() -> None:
    command = next((word for word in sys.argv[1:] if word != LAB), "")
    try:
        if sys.platform == "win32":
            raise LorafoldError(WINDOWS)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # blocked at the start
        if command in TUNED_PROCESS:
            restart_tuned()
        proc = detect_launch()
        if not proc.is_main:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the end
        notices, printed = logging.StreamHandler(), set()

        def is_new(line: logging.LogRecord) -> bool:  # a command may load an adapter more than once
            was_printed = line.getMessage() in printed
            printed.add(line.getMessage())
            return not was_printed

        notices.addFilter(is_new)
        logging.getLogger("lorafold").addHandler(notices)
        logging.getLogger("lorafold").setLevel(logging.INFO)
        if proc.world > 1 and command in COMMANDS.keys() - MULTI_PROCESS:
            raise LorafoldError(
                f"lorafold {command}: {proc.by} started {proc.world} processes, expected one; start"
                f" the command without {proc.by} (lorafold train supports several processes)"
            )
        with imports_frozen():
            code = app(prog_name="lorafold", standalone_mode=False)
        if code == CTRL_C:  # Typer catches the exception
            raise KeyboardInterrupt
    except LorafoldError as error:
        code = _fail(str(error))
    except Interrupted as interruption:
        typer.echo(str(interruption), err=True)
        code = interruption.code
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)  # for usage errors
        path = context.command_path if context else "lorafold"
        code = _fail(f"{error.format_message().removesuffix('.')}; see {path} --help")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process ends
        typer.echo("interrupted by Ctrl-C", err=True)
        code = CTRL_C
    except OSError as error:
        code = _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except Exception:
        sys.stderr = sys.__stderr__  # because it is /dev/null on ranks other than 0
        raise
    sys.exit(code)


def _fail(message: str) -> int:
    typer.echo("error: " + " ".join(line.strip() for line in message.splitlines()), err=True)
    return 2
