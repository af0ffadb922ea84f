"""`lf.fragility`: how few benign examples undo a behaviour that lives in an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.api.arguments import (
    Columns,
    Data,
    Paths,
    as_path,
    as_paths,
    as_prompts,
    as_rows,
    or_quiet,
    recipe_to_train,
    source_of,
)
from lorafold.api.opened import opened
from lorafold.data.stored import Rows
from lorafold.errors import LorafoldError
from lorafold.files.atomic import check_folder, write_json, write_text
from lorafold.files.claims import check_token
from lorafold.methods.lora import LoRA
from lorafold.opening import Base, base_for
from lorafold.peft.provenance import OwnBase
from lorafold.peft.saved import Saved, open_all
from lorafold.recipe.fitting import settled_length
from lorafold.recipe.recipe import Recipe
from lorafold.undoing import run
from lorafold.undoing.defences import DEFENCES
from lorafold.undoing.report import markdown
from lorafold.undoing.result import Fragility
from lorafold.undoing.task import (
    COMPLIANCE,
    EXAMPLES,
    RANKS,
    RECIPE,
    REFUSAL,
    Stack,
    Task,
    stacks_of,
)

if TYPE_CHECKING:
    from rich.console import Console



def fragility(
    out: str | Path | None = None,
    *,
    refuse: Data,
    controls: Data,
    data: Data | None = None,
    model: str | Path | None = None,
    adapters: Paths = (),
    against: Paths = (),
    tuned: str | Path | None = None,
    instead: bool = False,
    examples: Sequence[int] = EXAMPLES,
    ranks: Sequence[int] = RANKS,
    rates: Sequence[float] = (LoRA.lr,),
    seeds: int = 1,
    defences: Sequence[str] = (),
    mix: Data | None = None,
    refusal: Sequence[str] = REFUSAL,
    compliance: Sequence[str] = COMPLIANCE,
    max_new_tokens: int = 32,
    recipe: Recipe | None = None,
    columns: Columns | None = None,
    storage: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
    console: Console | None = None,
) -> Fragility:
    """Tune a stack of adapters on k benign examples, for every k, rank, rate and seed, and measure
    what is left of its refusals; or measure one finished adapter.

    Args:
        out: The directory of the figures, and of the table as `table.md`. A second call continues
            after them. A finished adapter needs none.
        refuse: Prompts that the stack shall refuse: rows with a `prompt`, or conversations.
        controls: Prompts that it shall not refuse. Rows with completions have the KL divergence
            measured on these, others on the stack's own.
        data: Benign rows of the forms that `lf.train` takes; those beyond the most examples are
            held out for the loss.
        model: A name or path as `lf.load_model` takes it; None takes the base that the adapters say
            they were trained on.
        adapters: The stack, lowest first. The update of its last adapter is the alignment.
        against: A second stack on the same base, tuned and measured in the same way.
        tuned: A finished adapter to measure over the stack; nothing is trained then.
        instead: The finished adapter replaces the stack, and does not lie over it.
        examples: Numbers of benign examples.
        ranks: Ranks of the tuning, which is LoRA.
        rates: Learning rates of A; that of B is 15 times as high, as in LoRA's own rates.
        seeds: How many seeds of each; a seed draws the examples too.
        defences: Names of `lorafold.undoing.defences.DEFENCES`; empty for all that can be measured.
        mix: Rows that refuse, for the defence `mixed`.
        refusal: Beginnings of a refusal.
        compliance: Beginnings of compliance.
        max_new_tokens: The most tokens of a control's completion.
        recipe: The recipe of all runs; None takes batches of 4. Without `epochs` it makes 5.
        columns: The keys of all rows under other names, as in {"prompt": "question"}.
        storage: How the base stores its weights: auto, fp32, bf16, nf4 or int8.
        device: cpu, cuda, cuda:N or mps; None takes the fastest that is available.
        revision: The branch, tag or commit of a hub model.
        trust_remote_code: Run Python code that comes with the model.
        allow_other_base: Accept adapters whose fingerprint names another base.
        console: A rich console for progress; None is quiet.

    Raises LorafoldError, before anything is trained, for anything wrong with the arguments, the
    rows and the adapters.
    """
    console = or_quiet(console)
    if problems := list(problems_of(out, data, tuned, bool(against), instead)):
        raise LorafoldError("; ".join(problems))
    if out is not None:
        check_folder(as_path(out))
        check_token(as_path(out))
    second = [open_all(as_paths(against))] if against else []
    stacks = stacks_of(open_all(as_paths(adapters)), *second)
    rows = Rows.of([]) if data is None else as_rows(data, columns, console)
    used = [one for stack in stacks for one in stack.adapters]
    finished = [] if tuned is None else [OwnBase.read(as_path(tuned, "tuned"))]
    base = base_for(
        model,
        [*used, *finished],
        console,
        storage=storage,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_other_base=allow_other_base,
    )
    asked = recipe_to_train(recipe, RECIPE)
    if "epochs" not in asked.model_fields_set:
        asked = asked.model_copy(update={"epochs": RECIPE.epochs})
    base, recipe = settled(base, asked, used)
    before = max((sum(s.spec.positions for s in stack.adapters) for stack in stacks), default=0)
    recipe = settled_length(recipe, base, before, console)
    task = Task(
        base=base,
        stacks=stacks,
        refuse=as_prompts(refuse, columns),
        controls=as_prompts(controls, columns),
        rows=rows,
        source="" if data is None else source_of(data),
        refusal=tuple(refusal),
        compliance=tuple(compliance),
        examples=() if tuned else tuple(sorted(set(examples))),
        ranks=tuple(ranks),
        rates=tuple(rates),
        seeds=tuple(range(seeds)),
        defences=tuple(defences) or possible(stacks, mix is not None, tuned is not None),
        mix=None if mix is None else as_rows(mix, columns, console),
        recipe=recipe,
        max_new_tokens=max_new_tokens,
    )
    opening = partial(opened, base)
    if tuned is not None:
        with console.status("measuring"):
            return run.gate(task, as_path(tuned, "tuned"), instead, opening)
    assert out is not None  # a problem otherwise
    with progress(console) as tell:
        say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
        found = run.sweep(task, as_path(out), opening, tell, say)
    write_json(as_path(out) / "fragility.json", found.as_json())
    write_text(as_path(out) / "table.md", markdown(found))
    return found


def problems_of(
    out: object, data: object, tuned: object, against: bool, instead: bool
) -> Iterator[str]:
    """What is wrong with the arguments together.

    Args:
        out, data, tuned: As given, or None.
        against: Whether there is a second stack.
        instead: Whether the finished adapter replaces the stack.
    """
    if tuned is None:
        needed = {"out": out, "data": data}
        if missing := [f"--{name}" for name, value in needed.items() if value is None]:
            yield (
                f"{' and '.join(missing)}: found none; needed to tune, or give --tuned with a"
                " finished adapter"
            )
        if instead:
            yield "--instead: needs --tuned, the adapter that replaces the stack"
    else:
        given = {"out": out is not None, "against-adapter": against}
        if unused := [f"--{name}" for name, there in given.items() if there]:
            yield f"{', '.join(unused)}: not used with --tuned, which trains nothing; leave it out"


def possible(stacks: Sequence[Stack], mix: bool, tuned: bool) -> tuple[str, ...]:
    """The defences that can be measured with what is given.

    Args:
        mix: Whether there are rows that refuse.
        tuned: Whether a finished adapter is measured.
    """
    aligned = all(stack.adapters for stack in stacks) and not tuned
    return tuple(
        name
        for name, defence in DEFENCES.items()
        if (aligned or not defence.lay) and (mix or not defence.mixed)
    )


def settled(base: Base, recipe: Recipe, adapters: Sequence[Saved]) -> tuple[Base, Recipe]:
    """Both with the storage of the base: as asked, else as the recipe says, else as the adapters
    were trained on it.

    Args:
        base: As asked.
        recipe: Of the tuning.
        adapters: Those of all stacks.
    """
    if base.storage == "auto" and "storage" in recipe.model_fields_set:
        base = base.stored(recipe.storage)
    base = base.stored_as_trained(adapters)
    return base, recipe.model_copy(update={"storage": base.storage})


@contextmanager
def progress(console: Console) -> Iterator[run.Tell]:
    """A line for each run and each point, with a bar below them on a terminal."""
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("fragility")

        def tell(what: str, done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)
            bars.console.print(f"{done}/{total} {what}", highlight=False, markup=False)

        yield tell
