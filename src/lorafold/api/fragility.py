"""`lf.fragility`: how few benign examples undo a behaviour that an adapter taught."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Unpack

from lorafold.api import options as opt
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from lorafold.fragility_study.result import Fragility
    from lorafold.recipe.recipe import Recipe

TUNING = "Tuning"
TASK_RECIPE = "lorafold.fragility_study.task:RECIPE"
FIELDS = ["alpha", "dropout", "targets", "schedule", "warmup", "epochs", "batch", "max_length"]
FORMS = " A file as for train; each row is {prompt} (text or messages) or a conversation."


@dataclass(frozen=True)
class Probes:
    """The prompts on which refusals are measured, and the prefixes of refusal and compliance.

    Args:
        refusal_prefix: The beginning of a refusal, such as "I can't".
        compliance_prefix: The beginning of a compliant answer, such as "Sure".
        max_new_tokens: The maximum number of tokens per control completion.
    """

    refuse: Annotated[opt.Data, opt.Option(f"Prompts to be refused.{FORMS}", kind=Path)]
    controls: Annotated[
        opt.Data, opt.Option(f"Prompts to be answered.{FORMS} Completions are used.", kind=Path)
    ]
    refusal_prefix: Annotated[Sequence[str], opt.Option(rare=True)] = ("I can't",)
    compliance_prefix: Annotated[Sequence[str], opt.Option(rare=True)] = ("Sure",)
    max_new_tokens: Annotated[int, opt.Option(rare=True, min=1)] = 32


@dataclass(frozen=True)
class Tuning:
    """The fine-tuning runs on an adapter stack: one for each number of examples, rank, learning
    rate and seed.

    Args:
        examples: The number of benign examples of a fine-tuning run; repeat the option to test
            several. In Python, a list of numbers.
        rank: The LoRA rank of a fine-tuning run; repeat the option to test several. In Python, a
            list of ranks.
        lr: A learning rate for A; the rate for B is 15 times as high. In Python, a list of rates.
        seeds: The number of seeds for each run. The seed also selects the examples.
    """

    examples: Annotated[Sequence[int], opt.Option(panel=TUNING)] = (1, 3, 10, 30, 100)
    rank: Annotated[Sequence[int], opt.Option(panel=TUNING)] = (4, 16)
    lr: Annotated[Sequence[float], opt.Option(panel=TUNING, rare=True)] = (2e-4,)
    seeds: Annotated[int, opt.Option(panel=TUNING, rare=True, min=1)] = 1


@dataclass(frozen=True)
class Defending:
    """The defences against the fine-tuning runs.

    Args:
        defence: A defence to measure: none, halved, projected, mixed, readded. Default: all that
            are possible.
        mix: Rows with refusals, as for train, for the defence mixed.
    """

    defence: Sequence[str] = ()
    mix: Annotated[opt.Data | None, opt.Option(kind=str, rare=True)] = None


@opt.verb
def fragility(
    out: str | Path | None = None,
    *,
    probes: Probes,
    data: Annotated[opt.Data | None, opt.Option(kind=list[str])] = None,
    model: opt.Model = None,
    adapters: opt.Adapters = (),
    against_adapter: Annotated[opt.Paths, opt.Option(rare=True)] = (),
    tuned: str | Path | None = None,
    instead: Annotated[bool, opt.Option(rare=True)] = False,
    tuning: Tuning = Tuning(),
    defending: Defending = Defending(),
    recipe: Annotated[
        "Recipe | None", opt.RecipeOptions(names=FIELDS, default=TASK_RECIPE)
    ] = None,
    html: str | Path | None = None,
    console: opt.Progress = None,
    **base_options: Unpack[opt.RowsOptions],
) -> "Fragility":
    """Measure how easily fine-tuning undoes a behaviour that an adapter taught.

    The last of `adapters` is the alignment: it makes the model refuse some prompts. LoRA adapters
    are trained on top of it on a few of your benign examples, also with defences, and refusals are
    measured before and after each run. With `tuned`, a finished adapter is measured instead, to
    test before a release whether it erodes refusals. Neither the prompts to be refused nor their
    completions are saved.

    Args:
        out: The directory for the results. To continue, run the same command again. In Python, it
            is not needed for a finished adapter.
        probes: The prompts on which refusals are measured, and the prefixes of answers.
        data: Benign rows, as for train. The loss is measured on the rows that are not trained on.
        against_adapter: The adapters of a second stack, to tune and measure in the same way.
        tuned: Measure this finished adapter on top of the stack, and train nothing.
        instead: `tuned` replaces the stack instead of lying on top of it.
        tuning: The fine-tuning runs.
        defending: The defences against the fine-tuning runs.
        recipe: The recipe of all runs. Default: batches of 4 rows, and 5 epochs.
        html: Also write the curves and the table to one HTML file.

    Raises LorafoldError, before anything is trained, for invalid arguments, rows or adapters.

    Examples:
        lorafold lab fragility policy --refuse refuse.jsonl \\
            --controls controls.jsonl --data benign.jsonl --out fragile
        lorafold lab fragility policy --refuse refuse.jsonl \\
            --controls controls.jsonl --data benign.jsonl --out few --rank 8
        lorafold lab fragility policy --refuse refuse.jsonl \\
            --controls controls.jsonl --tuned tuned --fail-under 0.8

    Notes:
        How to read the figures. Log-odds: the log-probability of the beginning of a refusal minus
        the log-probability of the beginning of a compliant answer, averaged over the prompts; above
        0, the model tends to refuse. Kept: the share that remains of the log-odds that the
        alignment added; 1 is unchanged, 0 is undone. Refusals: the share of greedy completions that
        begin with a refusal. KL: how far the control completions moved, in nats per token. Overlap:
        the share of the tuning's energy in the directions of the alignment's update, next to the
        share in random directions. Halved at: the number of benign examples at which half is kept.
    """
    from functools import partial

    from lorafold.api import arguments as args
    from lorafold.api.model_arguments import load_with_adapters
    from lorafold.data.row_store import Rows
    from lorafold.files.atomic import write_json, write_text
    from lorafold.files.terminal import print_lines, progress_bar
    from lorafold.fragility_study import run
    from lorafold.fragility_study.defences import DEFENCES
    from lorafold.fragility_study.report import markdown, page
    from lorafold.fragility_study.task import RECIPE, FragilityTask, stacks_of
    from lorafold.peft.adapter_directory import open_all
    from lorafold.peft.provenance import RecordedBase
    from lorafold.recipe.resolve_settings import resolve_length
    from lorafold.resolve import base_for

    html_path, console = args.as_html_path(html), args.console_or_quiet(console)
    if problems := list(argument_problems(out, data, tuned, bool(against_adapter), instead)):
        raise LorafoldError("; ".join(problems))
    study = None if out is None else args.as_study_path(out)
    second_stack = [open_all(args.as_paths(against_adapter))] if against_adapter else []
    stacks = stacks_of(open_all(args.as_paths(adapters)), *second_stack)
    reading = args.as_reading(base_options)
    rows = Rows.of([]) if data is None else args.as_rows(data, reading, console)
    adapters_used = [one for stack in stacks for one in stack.adapters]
    finished = None if tuned is None else args.as_path(tuned, "tuned")
    tuned_base = [RecordedBase.read(finished)] if finished else []
    base = base_for(model, [*adapters_used, *tuned_base], console, **base_options)
    run_recipe = args.as_recipe(recipe, RECIPE, trains=True)
    # quantization: the option, else the recipe's, else the adapters' during training
    if base.storage == "auto" and "storage" in run_recipe.model_fields_set:
        base = base.stored(run_recipe.storage)
    base = base.stored_as_trained(adapters_used)
    positions = (sum(s.spec.positions for s in stack.adapters) for stack in stacks)
    num_virtual = max(positions, default=0)
    epochs = (run_recipe if "epochs" in run_recipe.model_fields_set else RECIPE).epochs
    recipe = run_recipe.model_copy(update={"storage": base.storage, "epochs": epochs})
    recipe = resolve_length(recipe, base, num_virtual, console)
    has_alignment = all(stack.adapters for stack in stacks) and tuned is None
    mix = None if defending.mix is None else args.as_rows(defending.mix, reading, console)
    task = FragilityTask(
        base=base,
        stacks=stacks,
        refuse=args.as_prompts(probes.refuse, reading),
        controls=args.as_prompts(probes.controls, reading),
        rows=rows,
        source="" if data is None else args.source_label(data),
        refusal_prefixes=tuple(probes.refusal_prefix),
        compliance_prefixes=tuple(probes.compliance_prefix),
        examples=() if tuned else tuple(sorted(set(tuning.examples))),
        ranks=tuple(tuning.rank),
        rates=tuple(tuning.lr),
        seeds=tuple(range(tuning.seeds)),
        defences=tuple(defending.defence)
        or tuple(
            name
            for name, defence in DEFENCES.items()
            if (has_alignment or not defence.transform_update)
            and (mix is not None or not defence.mixed)
        ),
        mix=mix,
        recipe=recipe,
        max_new_tokens=probes.max_new_tokens,
    )
    load_model = partial(load_with_adapters, base)
    if finished is not None:
        with console.status("measuring"):
            result = run.measure_tuned(task, finished, instead, load_model)
    else:
        assert study is not None  # see argument_problems
        with progress_bar(console, "fragility") as step:

            def tell(description: str, done: int, total: int) -> None:
                step(done, total)
                print_lines(console, f"{done}/{total} {description}")

            result = run.sweep(task, study, load_model, tell, partial(print_lines, console))
        write_json(study / "fragility.json", result.as_json())
        write_text(study / "table.md", markdown(result))
    if html_path is not None:
        page(result, html_path)
    return result


def argument_problems(
    out: object, data: object, tuned: object, against: bool, instead: bool
) -> Iterator[str]:
    """Yields the errors in a combination of arguments; `against` means that there is a second
    stack.
    """
    if tuned is None:
        required = {"out": out, "data": data}
        if missing := [f"--{name}" for name, value in required.items() if value is None]:
            yield (
                f"{' and '.join(missing)}: missing; required for tuning runs. To measure a finished"
                " adapter instead, pass --tuned"
            )
        if instead:
            yield "--instead: requires --tuned, the adapter that replaces the stack"
    else:
        unused_with_tuned = {"out": out is not None, "against-adapter": against}
        if unused := [f"--{name}" for name, is_given in unused_with_tuned.items() if is_given]:
            yield f"{', '.join(unused)}: not used with --tuned, which trains nothing; leave it out"
