"""The inputs of a training run: its request, objective, tokenizer and tokenized rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lorafold.data.batches import BatchFeed, StoredFeed, epoch_size, split
from lorafold.data.control_tokens import ALL_TOKENS, allow_tokens
from lorafold.data.json_input import Row
from lorafold.data.render import Rendering
from lorafold.data.row_checks import STREAMED, Findings, find_problems
from lorafold.data.row_store import Rows
from lorafold.data.stream import RowStream, StreamFeed
from lorafold.files.contents import file_digest
from lorafold.files.terminal import print_lines
from lorafold.models.built_in_templates import set_variables
from lorafold.models.tokenizer import AddedTokens, add_tokens, set_template
from lorafold.objectives import OBJECTIVES, check_formats
from lorafold.objectives.objective import Data, Objective, ObjectiveRequest, examples_of
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.recipe.recipe import Recipe
from lorafold.recipe.resolve_settings import resolve_length, spec_of
from lorafold.resolve import Base
from lorafold.training.checkpoint import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT = "eval_data"
REWARD_LIMITS = {"reward_seconds", "reward_concurrency", "reward_retries"}


@dataclass(frozen=True)
class RunRequest:
    """The inputs of a training run, and the path of its adapter.

    `out` must not exist unless `overwrite` or `resume` is set. Without `eval_rows`, the recipe's
    `eval_fraction` of `rows` is held out. The adapters of `over` are loaded frozen, in this order,
    below the trained one. `day` is the date in chat templates, by default the day the run begins.
    `rewards` are Python functions that are used in addition to the recipe's rewards, and
    `environment` is a Python object (see `lorafold.rewards.environments`).
    """

    base: Base
    out: Path
    recipe: Recipe
    rows: Sequence[Row] | RowStream
    source: str  # the origin of the rows, for the record
    eval_rows: Sequence[Row] | None = None
    init_adapter: Path | None = None
    resume: bool = False
    overwrite: bool = False
    over: tuple[Path, ...] = ()
    day: str = ""
    rewards: tuple[Callable[..., Any], ...] = ()
    environment: Any = ""

    @property
    def over_names(self) -> tuple[str, ...]:
        """The names of the `over` adapters on the model, lowest first."""
        return tuple(f"over{n}" for n, _ in enumerate(self.over, 1))

    @property
    def adapters(self) -> tuple[Path, ...]:
        return (*self.over, *([self.init_adapter] if self.init_adapter else []))

    @property
    def data(self) -> Rows | RowStream:
        """The rows as an object that has a digest (`identity`)."""
        return self.rows if isinstance(self.rows, RowStream) else Rows.of(self.rows)

    def first_rows(self, n: int) -> Sequence[Row]:
        """The first n rows; for a stream, the first n rows that are trained on."""
        if not isinstance(self.rows, RowStream):
            return self.rows[:n]
        rows = self.rows.rows(self.recipe.seed, self.recipe.shuffle_buffer)
        return [row for _, row, _ in islice(rows, n)]


def fixed_on_resume(recipe: Recipe, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without those that a resumed run may change, because they do not affect
    training.
    """
    free = {"keep", "trackers", "strategy"}
    free |= set() if recipe.stops else {"save_every", "eval_every"}
    options = {k: v for k, v in fields["objective_options"].items() if k not in REWARD_LIMITS}
    return {k: v for k, v in fields.items() if k not in free} | {"objective_options": options}


def rendering_of(recipe: Recipe) -> Rendering:
    return Rendering(recipe.train_on, recipe.mask_reasoning, recipe.end_of_turn)


def objective_of(request: RunRequest, saved: Sequence[SavedAdapter] = ()) -> Objective:
    recipe = request.recipe
    rows = () if isinstance(request.rows, RowStream) else request.rows
    check_formats(request.data.formats, recipe.objective)
    objective_request = ObjectiveRequest(
        recipe.objective, rows, request.base, saved, recipe.beta, recipe.objective_options,
        request.rewards, recipe.seed, request.environment,
    )  # fmt: skip
    return OBJECTIVES[recipe.objective].kind.of(objective_request)


def with_max_length(
    request: RunRequest, saved: Sequence[SavedAdapter], console: Console
) -> RunRequest:
    """The request with `max_length` set: the recipe's, a resumed run's, or the result of
    `resolve_length`.
    """
    recipe = request.recipe
    if request.resume and "max_length" not in recipe.model_fields_set:
        recorded = RunDirectory(request.out).recorded("max_length")
        if isinstance(recorded, int):
            return replace(request, recipe=recipe.model_copy(update={"max_length": recorded}))
    num_virtual = sum(adapter.spec.positions for adapter in saved)
    num_virtual += 0 if request.init_adapter else spec_of(recipe).positions
    return replace(request, recipe=resolve_length(recipe, request.base, num_virtual, console))


def prepare_tokenizer(
    request: RunRequest, objective: Objective, console: Console, saved: Sequence[SavedAdapter] = ()
) -> tuple[PreTrainedTokenizerBase, AddedTokens]:
    """The tokenizer of the model or an adapter, with the recipe's template and new tokens."""
    tokenizer = request.base.tokenizer(saved)
    if request.recipe.chat_template is not None:
        set_template(tokenizer, request.recipe.chat_template)
    if request.recipe.template_kwargs:
        set_variables(tokenizer, request.recipe.template_kwargs)
    new_tokens = request.recipe.new_tokens
    added = add_tokens(tokenizer, new_tokens) if new_tokens else AddedTokens({}, frozenset())
    template = objective.set_up(tokenizer)
    print_lines(console, added if new_tokens else "")
    print_lines(console, template, detail="turns end with" in str(template))
    if request.recipe.allow_control_tokens or added.ids:
        allow_tokens(tokenizer, ALL_TOKENS if request.recipe.allow_control_tokens else added.ids)
    return tokenizer, added


def train_and_eval_rows(request: RunRequest) -> tuple[Sequence[Row], Sequence[Row] | None]:
    assert not isinstance(request.rows, RowStream)
    held_out, recipe = request.eval_rows, request.recipe
    if held_out is None and recipe.eval_fraction:
        return split(request.rows, recipe.eval_fraction, recipe.seed)
    return request.rows, held_out or None


def tokenize_rows(
    request: RunRequest, tokenizer: PreTrainedTokenizerBase, objective: Objective, console: Console
) -> tuple[BatchFeed, Data | None, Findings]:
    """The batches of the run, the held-out examples or None, and the findings about the rows, which
    are printed.
    """
    recipe, rendering = request.recipe, rendering_of(request.recipe)
    encode = partial(
        examples_of, objective, tokenizer=tokenizer, max_length=recipe.max_length, console=console,
        rendering=rendering,
    )  # fmt: skip
    eval_examples, eval_pair = None, None
    if isinstance(request.rows, RowStream):
        feed: BatchFeed = StreamFeed(
            partial(request.rows.rows, buffer=recipe.shuffle_buffer),
            objective.encoder(tokenizer, rendering),
            recipe.max_length,
            recipe.batch,
            recipe.total_steps(0),
            recipe.seed,
        )
        if request.eval_rows:
            eval_examples = encode(request.eval_rows, called="held out")
        findings = Findings(0, unseen=STREAMED)
    else:
        rows, held_out = train_and_eval_rows(request)
        train = encode(rows)
        steps = recipe.total_steps(epoch_size(train.parts))
        feed = StoredFeed(train.examples, train.parts, recipe.batch, steps, recipe.seed)
        if held_out is not None:
            eval_examples = encode(held_out, called="held out")
            eval_pair = eval_examples.examples, Rows.of(held_out)
        findings = find_problems(train.examples, Rows.of(rows), recipe.max_length, eval_pair)
    print_lines(console, *findings.lines)
    return feed, eval_examples, findings


def input_identity(request: RunRequest, objective: Objective) -> dict[str, Any]:
    """The identity of further inputs of a run: held-out rows, the chat template file, and inputs of
    the objective.
    """
    held_out = Rows.of(request.eval_rows).sha256 if request.eval_rows else ""
    identity = {HELD_OUT: held_out, **objective.identity}
    if request.base.loaded is not None:
        identity["model"] = request.base.identity
    template = request.recipe.chat_template
    if template is not None and Path(template).is_file():
        identity["chat_template"] = file_digest(Path(template))[1]
    return identity
