"""The model that `eval` and `generate` ask about: a base with any number of saved adapters on
it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AllowOtherBaseOption = Annotated[
    bool,
    typer.Option(
        "--allow-other-base",
        help="Take an adapter although its fingerprint says that it was trained on another base.",
    ),
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
    classify: bool = False,
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The base with the adapters stacked in the order given, and its tokenizer or that of the last
    adapter with one, ready to use.

    `classify` asks for a sequence classifier instead of a language model. LorafoldError as the
    loaders do, and where the adapters are for the other one.
    """
    from lorafold.adapter import load
    from lorafold.errors import LorafoldError
    from lorafold.machine.devices import choose_device
    from lorafold.models.classifier import known_classes
    from lorafold.models.sources import resolve_model
    from lorafold.models.storage import choose_storage, held_as, weights_of
    from lorafold.models.tokenizer import tokenizer_of
    from lorafold.training.objectives import Classify, Objective, Sft

    source = resolve_model(model, revision)
    tokenizer = tokenizer_of(source, adapters, trust_remote_code)
    classes = known_classes(source, adapters)
    if (classes is not None) != classify:
        found = f"a classifier of {', '.join(classes)}" if classes else "no classifier"
        wanted = "a classifier" if classify else "a language model"
        raise LorafoldError(
            f"{', '.join(map(str, adapters)) or model}: found {found}, expected {wanted} for this"
            " data or command"
        )
    objective: Objective = Sft() if classes is None else Classify(classes)
    if notice := objective.set_up(tokenizer):
        console.print(notice, highlight=False, markup=False)
    where = choose_device(device)
    storage = choose_storage(held_as(source, adapters) if base == "auto" else base, where)
    console.print(f"{model} on {where}, {storage.why}", highlight=False, markup=False)
    loaded = objective.load(source, tokenizer, storage, where, 0, trust_remote_code)
    for number, path in enumerate(adapters, 1):
        load(
            loaded,
            path,
            name=f"adapter{number}",
            allow_other_base=allow_other_base,
            base=weights_of(source, storage),
        )
    return loaded, tokenizer
