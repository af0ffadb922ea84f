"""`lf.score`: score rows with a reward model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Unpack

from lorafold.api import options as opt
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from lorafold.evaluation.reward_model_scores import ScoredRows


@opt.verb
def score(
    model: opt.ModelOrLoaded = None,
    data: opt.MeasuredRows = None,
    *,
    adapters: opt.Adapters = (),
    tokenizer: opt.Tokenizer = None,
    out: str | Path | None = None,
    overwrite: Annotated[bool, opt.Option(rare=True)] = False,
    max_length: opt.Length = None,
    console: opt.Progress = None,
    **base_options: Unpack[opt.RowsOptions],
) -> "ScoredRows":
    """Score rows with a reward model: an adapter trained with --objective reward, or a whole model.

    For preference rows, both completions are scored, followed by accuracy, margin, calibration and
    length bias, with 95% intervals. Other rows are scored as a whole, up to the end of the
    assistant's last turn.

    Args:
        out: A new file for the scores, with one JSON object per row. Default: print them.
        overwrite: Replace the file OUT.

    Raises LorafoldError for bad rows, for a model that can't be loaded or is no reward model, and
    for scores that are not finite.

    Examples:
        lorafold train --objective reward --data pairs.jsonl --out judge
        lorafold lab score judge --data pairs.jsonl
        lorafold lab score judge --data pairs.jsonl --out scores.jsonl
    """
    from lorafold.api.arguments import as_path, as_reading, as_rows, missing_argument

    if data is None:
        raise missing_argument("data")
    out_path = None if out is None else as_path(out)
    if out_path is not None and out_path.exists() and (out_path.is_dir() or not overwrite):
        problem = "is a directory; expected a new file" if out_path.is_dir() else "exists"
        hint = "; pass --overwrite to replace it" * out_path.is_file()
        raise LorafoldError(f"{out_path} {problem}{hint}")
    rows = as_rows(data, as_reading(base_options), console, objective=None)
    from lorafold.api.model_arguments import load_with_adapters, resolve_model, truncation_length
    from lorafold.evaluation.reward_model_scores import score_rows

    base, saved = resolve_model(model, adapters, console, **base_options)
    length = truncation_length(base, max_length, saved, console, head=True)
    loaded, tokenizer = load_with_adapters(base, saved, tokenizer, reward=True, console=console)
    scored = score_rows(loaded, tokenizer, rows, length, console=console)
    if out_path is not None:
        scored.write(out_path)
    return scored
