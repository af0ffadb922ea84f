"""The options of commands that open a base model without adapters."""

from dataclasses import dataclass
from typing import Annotated

import typer

from lorafold.cli.common import BASE, KINDS, Computing, Source

ModelOption = Annotated[str, typer.Option(rich_help_panel=BASE, help=f"The base: {KINDS}.")]


@dataclass(frozen=True)
class Alone(Source):
    """A base model without adapters."""

    model: ModelOption = "smollm2"


@dataclass(frozen=True)
class ComputingAlone(Computing):
    """A base model without adapters, and the device that computes with it."""

    model: ModelOption = "smollm2"
