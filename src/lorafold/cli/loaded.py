"""The model that `eval` and `generate` ask about: a base with any number of saved adapters on it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AllowOtherBaseOption = Annotated[
    bool, typer.Option("--allow-other-base", help="Take an adapter although its fingerprint says that it was trained on another base.")
]


def load_adapted(
    model: str,
    adapters: Sequence[Path],
    base: str,
    device: str | None,
    revision: str | None,
    trust_remote_code: bool,
    allow_other_base: bool,
    console: "Console",
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The base with the adapters stacked in the order given, and its tokenizer with a chat template. LorafoldError as the loaders do."""
    from lorafold.adapter import load
    from lorafold.io.models import choose_device, choose_dtype, load_model, load_tokenizer, resolve_model
    from lorafold.train.render import ensure_chat_template

    source = resolve_model(model, revision)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    if notice := ensure_chat_template(tokenizer):
        console.print(notice, highlight=False, markup=False)
    where = choose_device(device)
    dtype, why = choose_dtype(base, where)
    console.print(f"{model} on {where}, {why}", highlight=False, markup=False)
    loaded = load_model(source, dtype, where, trust_remote_code=trust_remote_code)
    for number, path in enumerate(adapters, 1):
        load(loaded, path, name=f"adapter{number}", allow_other_base=allow_other_base)
    return loaded, tokenizer
