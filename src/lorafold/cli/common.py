"""Options that several commands share, and the output of all commands.

Messages and progress go to stderr. The result goes to stdout: text for people, or with --json one
JSON object as the last line.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafold.errors import LorafoldError
from lorafold.models.storages import LISTED

if TYPE_CHECKING:
    from rich.console import Console

BASE = "Base model"
KINDS = "smollm2 (embedded), a directory, a .gguf file or a hub id (owner/name)"

ModelOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=BASE,
        help=f"The base: {KINDS}. Default: the adapter's own base, as its record says; without an"
        " adapter smollm2.",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=BASE,
        hidden=True,
        help="cpu, cuda, cuda:N or mps. Without it the fastest that this machine has.",
    ),
]
ControlTokensOption = Annotated[
    bool, typer.Option("--allow-control-tokens", help="Those in messages are tokens, not text.")
]
TrainedStorageOption = Annotated[
    str,
    typer.Option(
        rich_help_panel=BASE,
        help=f"How the base stored its weights in training: {LISTED} or auto, which takes it from"
        " the adapters' records.",
    ),
]
AllowOtherOption = Annotated[
    bool,
    typer.Option(
        "--allow-other-base",
        rich_help_panel=BASE,
        hidden=True,
        help="Accept an adapter although its fingerprint says it was trained on another base.",
    ),
]
OverOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--over",
        help="The adapter that this one was trained over; of a stack each, the lowest first.",
    ),
]
DataOption = Annotated[
    str,
    typer.Option(
        help=(
            "A file (.jsonl, .json, .csv, .tsv, .parquet, .arrow; also .gz, .zst), a directory,"
            " a pattern such as \"data/*.jsonl\", or a hub dataset. A row is"
            " {messages}, {prompt, completion}, {conversations} (ShareGPT), {instruction, output}"
            " (Alpaca), {prompt, chosen, rejected}, {text} or {text, label}; conversations may have"
            " tools."
        )
    ),
]
TrainDataOption = Annotated[
    list[str],
    typer.Option(
        help=(
            "A file (.jsonl, .json, .csv, .tsv, .parquet, .arrow; also .gz, .zst), a directory,"
            " a pattern such as \"data/*.jsonl\", or a hub dataset. FILE:0.3 takes"
            " 0.3 of its rows an epoch. A row is {messages}, {prompt, completion}, {conversations}"
            " (ShareGPT), {instruction, output} (Alpaca), {text} or {text, label}."
        )
    ),
]
OptionalDataOption = Annotated[
    list[str] | None,
    typer.Option(help="Training rows, as for train. Without them the quickstart's task is used."),
]
HeldOutOption = Annotated[
    str | None,
    typer.Option(help="Held-out rows. Without them --eval-fraction or a tenth is held out."),
]
SeedOption = Annotated[
    int,
    typer.Option(
        min=0,
        max=2**32 - 1,
        help="The seed of everything that is drawn at random: the same seed, the same result.",
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option(
        "--json",
        hidden=True,
        help="Print the result as one JSON object, the last line of stdout.",
    ),
]


@dataclass(frozen=True)
class Source:
    """The base model, by default that of the adapters, and how to get it."""

    model: ModelOption = None
    revision: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=BASE,
            hidden=True,
            help="The branch, tag or commit of a hub model. Only a commit never changes.",
        ),
    ] = None
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            rich_help_panel=BASE,
            hidden=True,
            help="Run Python code that comes with the model. It gets all the rights you have.",
        ),
    ] = False

    @property
    def how(self) -> dict[str, Any]:
        """The arguments, besides the name, by which a verb opens the model."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


@dataclass(frozen=True)
class Computing(Source):
    """A base, and the device that computes with it."""

    device: DeviceOption = None

    @property
    def how(self) -> dict[str, Any]:
        """The arguments, besides the name, by which a verb opens the model."""
        return {**super().how, "device": self.device}


@dataclass(frozen=True)
class Opening(Computing):
    """A base that saved adapters are loaded on, and how to load it."""

    storage: Annotated[
        str,
        typer.Option(
            rich_help_panel=BASE,
            help=(
                f"How the base stores its weights: {LISTED} or auto. auto takes the storage that"
                " the adapter was trained on, else bf16 or fp32, whichever the device is faster"
                " with."
            ),
        ),
    ] = "auto"
    allow_other_base: AllowOtherOption = False

    @property
    def how(self) -> dict[str, Any]:
        """The arguments, besides the name, by which a verb opens the model."""
        more = {"storage": self.storage, "allow_other_base": self.allow_other_base}
        return {**super().how, **more}


@dataclass(frozen=True)
class Adapters:
    """Saved adapters, by position or by `--adapter`."""

    positional: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[ADAPTER]...",
            show_default=False,
            help="Saved adapters in PEFT's format, stacked on the base in this order.",
        ),
    ] = None
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            "--adapter",
            help="The same by name.",
        ),
    ] = None

    @property
    def paths(self) -> list[Path]:
        """All of them, in order. LorafoldError where both ways are taken, which have no order."""
        if self.positional and self.adapter:
            raise LorafoldError(
                f"--adapter {self.adapter[0]}: found {self.positional[0]} by its position too,"
                " expected all adapters in one of the two ways"
            )
        return self.positional or self.adapter or []

    @property
    def some(self) -> list[Path]:
        """All of them. LorafoldError where there is none."""
        if not self.paths:
            raise LorafoldError("ADAPTER: found none, expected the directory of a saved adapter")
        return self.paths

    @property
    def one(self) -> Path:
        """The only one. LorafoldError where there is none or more."""
        if len(self.some) > 1:
            raise LorafoldError(
                f"ADAPTER: found {', '.join(map(str, self.some))}, expected exactly one"
            )
        return self.some[0]


@dataclass(frozen=True)
class Sampling:
    """How a model's next words are chosen, and what comes before the user's."""

    system: Annotated[
        str | None,
        typer.Option(help="A system message. Without it the chat template's default."),
    ] = None
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="The most tokens of a completion.")
    ] = 256
    temperature: Annotated[
        float,
        typer.Option(min=0, help="0 takes the most likely token; above 0 tokens are sampled."),
    ] = 0.0
    seed: SeedOption = 0
    allow_control_tokens: ControlTokensOption = False


@dataclass(frozen=True)
class Output:
    """The directory of a result."""

    out: Annotated[
        Path,
        typer.Option(
            help="The directory of the result. It must be new, and appears once it is complete."
        ),
    ]
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            hidden=True,
            help="Replace what an earlier run wrote to OUT, once the new result is complete.",
        ),
    ] = False


def messages() -> "Console":
    """The console for messages and progress: stderr, so that only the result goes to stdout."""
    from rich.console import Console

    return Console(stderr=True)


def emit(json: bool, result: Mapping[str, Any], text: str) -> None:
    """Print the result to stdout.

    Args:
        json: Print `result` as one line of JSON; numbers that are not finite become null.
        result: The result, by its keys in the JSON.
        text: The result for people, which is printed otherwise.
    """
    if json:
        from pydantic_core import to_json

        text = to_json(dict(result), inf_nan_mode="null").decode()
    typer.echo(text)
