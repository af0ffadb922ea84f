"""`lf.score`: the scores that a reward model gives rows, and how well it tells preferences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.api.arguments import Columns, Data, Paths, as_paths, as_rows, missing

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorafold.evaluation.scoring import ScoredRows


def score(
    model: str | Path | PreTrainedModel | None = None,
    data: Data | None = None,
    *,
    columns: Columns | None = None,
    adapters: Paths = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    storage: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
    console: Console | None = None,
) -> ScoredRows:
    """Score rows with a reward model: the scores, and for pairs accuracy, margin, calibration and
    the bias to length, with 95% intervals.

    Args:
        model: The base's name or path, the path of a reward model, or a loaded one, which is used
            with its active adapters and takes no other `storage`, `device`, `revision` or
            `allow_other_base`. None takes the base that the adapters say they were trained on.
        data: Rows of preferences, or of completions, conversations or text, whose last turn of the
            assistant ends the text that is scored.
        columns: The keys of the rows under other names, as in {"prompt": "question"}.
        adapters: Saved adapters to load on a model that is named, among them a reward model's.
        tokenizer: None takes that of the adapters or the model.
        max_length: Longer texts are cut to this many tokens, and counted; None takes 1,024, or as
            many as the model has positions.
        storage: How the base stores its weights: auto, fp32, bf16, nf4 or int8.
        device: cpu, cuda, cuda:N or mps; None takes the fastest that is available.
        revision: The branch, tag or commit of a hub model.
        trust_remote_code: Run Python code that comes with the model.
        allow_other_base: Accept adapters whose fingerprint names another base.
        console: A rich console for progress and notices; None is quiet.

    Raises LorafoldError for bad rows, for a model that can't be loaded or is no reward model, and
    for scores that are not finite.
    """
    if data is None:
        raise missing("data")
    rows = as_rows(data, columns, console, objective=None)
    from lorafold.api.opened import at_hand, length_for, opened
    from lorafold.evaluation.scoring import score_rows
    from lorafold.peft.saved import open_all

    found = open_all(as_paths(adapters))
    asked = at_hand(
        model,
        found,
        console,
        storage=storage,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_other_base=allow_other_base,
    )
    length = length_for(asked, max_length, found, console, head=True)
    loaded, tokenizer = opened(asked, found, tokenizer, reward=True, console=console)
    return score_rows(loaded, tokenizer, rows, length, console=console)
