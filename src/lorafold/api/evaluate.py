"""`lf.evaluate`: loss, perplexity and exact match of a model or adapter on rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.api.arguments import Columns, Data, Paths, as_paths, as_rows
from lorafold.data.shapes import LABELS
from lorafold.objectives import OBJECTIVES

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorafold.evaluation import Evaluation
    from lorafold.peft.saved import Saved
    from lorafold.step.preference_laws import Law


def evaluate(
    model: str | Path | PreTrainedModel,
    data: Data,
    *,
    columns: Columns | None = None,
    adapters: Paths = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    completions: bool = True,
    max_new_tokens: int | None = None,
    storage: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
    console: Console | None = None,
) -> Evaluation:
    """Measure loss in nats a labelled token, perplexity and exact match, with 95% intervals.

    On rows of preferences these are of the chosen completions, and the accuracy, the margin and the
    change of the preference are measured as well.

    Args:
        model: A name or path, or a loaded model, which is measured with its active adapters and
            takes no other `storage`, `device`, `revision` or `allow_other_base`.
        data: Rows, of the forms that `lf.train` takes; texts with labels need a classifier.
        columns: The keys of the rows under other names, as in {"prompt": "question"}.
        adapters: Saved adapters to load on a model that is named.
        tokenizer: None takes that of the adapters or the model.
        max_length: Longer rows are cut to this many tokens for the loss; None takes 1,024, or as
            many as the model has positions.
        completions: Generate completions for the exact match; False measures the loss alone.
        max_new_tokens: The most tokens of a completion; None takes the longest reference.
        storage: How the base stores its weights: auto, fp32, bf16, nf4 or int8.
        device: cpu, cuda, cuda:N or mps; None takes the fastest that is available.
        revision: The branch, tag or commit of a hub model.
        trust_remote_code: Run Python code that comes with the model.
        allow_other_base: Accept adapters whose fingerprint names another base.
        console: A rich console for progress and notices; None is quiet.

    Raises LorafoldError for bad rows, for a model or adapter that can't be loaded or does not suit
    the rows, and for a loss that is not finite.
    """
    rows = as_rows(data, columns, console, objective=None)
    from lorafold import evaluation
    from lorafold.api.opened import at_hand, length_for, opened
    from lorafold.peft.saved import open_all

    asked = at_hand(
        model,
        adapters,
        storage=storage,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_other_base=allow_other_base,
    )
    found = open_all(as_paths(adapters))
    labels = rows.give(LABELS)
    length = length_for(asked, max_length, found, console, head=labels)
    loaded, tokenizer = opened(asked, found, tokenizer, classify=labels, console=console)
    return evaluation.evaluate(
        loaded,
        tokenizer,
        rows,
        length,
        evaluation.EvaluationSettings(completions, max_new_tokens, law_of_adapters(found)),
        console,
    )


def law_of_adapters(adapters: Sequence[Saved]) -> Law:
    """The law that the last adapter was trained with, from its record; that of DPO if it was none.
    """
    from lorafold.objectives.comparing import law_of
    from lorafold.step.preference_laws import Dpo

    recipe = adapters[-1].recipe if adapters else {}
    objective = recipe.get("objective")
    if objective not in OBJECTIVES or not OBJECTIVES[objective].law:
        return Dpo()
    return law_of(objective, recipe.get("beta"), recipe.get("objective_options") or {})
