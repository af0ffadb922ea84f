"""What each side of a comparison computed, counted where it computes it. Figures of two sides stand
beside each other only where that is the same.

    same_work({"lorafold": a, "TRL": b})         ends the program, with one line, if a is not b
    python -m lib.work train ... --json          the command; its JSON has its `work` as well
    with watched() as work: ...                  the same of what trains in this process
    of_trainer(trainer, work)                    of a trainer of transformers or TRL

Counted are optimizer steps, the rows that they train on (of a pair both completions, of a prompt
each completion), and the targets: the tokens whose likelihood is in the loss. Neither padding nor
what rows that begin alike have in common counts, which one side may compute more often.
"""

import io
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

Work = dict[str, int]
NO_LOSS = -100


def same_work(sides: Mapping[str, Mapping[str, float]]) -> None:
    """End the program unless all sides have the same counts, none of which is nothing."""
    found: dict[str, list[float]] = {}
    for work in sides.values():
        for name in work:
            found[name] = [own.get(name, 0) for own in sides.values()]
    wrong = [
        f"{name} {' and '.join(f'{n:,}' for n in counts)}"
        for name, counts in found.items()
        if len({*counts}) > 1 or not all(counts)
    ]
    if wrong or not found:
        raise SystemExit(
            f"{' and '.join(sides)} did not compute the same, so they are not compared:"
            f" {', '.join(wrong) or 'nothing was counted'}"
        )


def none() -> Work:
    """Nothing yet."""
    return {"steps": 0, "rows": 0, "targets": 0}


def targets(labels: Any, counts: Any = None, **_: Any) -> int:
    """The targets of a loss of lorafold.

    Args:
        labels: Shifted ones (B, T), -100 where there is no target, or classes (B,).
        counts: How many rows train on each token (B, T); None: one.
    """
    trained = labels != NO_LOSS
    return int((trained if counts is None else counts * trained).sum())


@contextmanager
def stepping(work: Work) -> Iterator[Work]:
    """Count the steps of all optimizers of this process."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    def before(optimizer: Any, args: Any, kwargs: Any) -> None:
        work["steps"] += 1

    hook = register_optimizer_step_pre_hook(before)
    try:
        yield work
    finally:
        hook.remove()


def of_loss(loss: Any, work: Work) -> Any:
    """Count the targets of a module, a loss of lorafold, in each of its passes; a handle."""

    def before(module: Any, args: Any, inputs: Any) -> None:
        work["targets"] += targets(**inputs)

    return loss.register_forward_pre_hook(before, with_kwargs=True)


def of_model(model: Any, work: Work) -> Any:
    """Count rows and targets of a model of transformers that is given labels; a handle."""

    def before(module: Any, args: Any, inputs: Any) -> None:
        work["rows"] += len(inputs["labels"])
        work["targets"] += targets(inputs["labels"][:, 1:])

    return model.register_forward_pre_hook(before, with_kwargs=True)


@contextmanager
def watched() -> Iterator[Work]:
    """Count what the loop of lorafold trains in this process."""
    from lorafold.training import loop

    work, step = none(), loop.train_step

    def counted(job: Any, examples: Any, at: int) -> float:
        work["rows"] += sum(len(getattr(e, "branches", "1")) for e in examples)
        hook = of_loss(job.loss, work)
        try:
            return step(job, examples, at)
        finally:
            hook.remove()

    loop.train_step = counted
    try:
        with stepping(work):
            yield work
    finally:
        loop.train_step = step


def of_trainer(trainer: Any, work: Work) -> None:
    """Count what a trainer trains, but for its steps (`stepping`): SFT, padded or packed, DPO and
    GRPO.
    """
    compute = trainer.compute_loss

    def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            labels, places = inputs.get("labels"), inputs.get("position_ids")
            mask = inputs.get("completion_mask")
            if labels is not None:
                work["rows"] += len(labels) if places is None else int((places == 0).sum())
                work["targets"] += targets(labels[:, 1:])
            else:  # its first token is a target where prompts are apart
                work["rows"] += len(mask)
                work["targets"] += int(mask.sum())
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = counted


def main() -> None:
    """Run the command of the arguments, and print what it says with what it computed."""
    from lorafold.runtime.process_tuning import restart_tuned

    restart_tuned()  # as the command does, before anything that is slow
    from lorafold.cli import main as command

    sys.argv[0], said = "lorafold", io.StringIO()
    with watched() as work, redirect_stdout(said):
        try:
            command()
        except SystemExit as end:
            if end.code:
                raise
    lines = said.getvalue().splitlines()[-1:]  # only the first process of a run has any
    print(json.dumps(json.loads(*lines or ["{}"]) | {"work": work}), flush=True)


if __name__ == "__main__":
    main()
