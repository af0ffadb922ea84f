"""The two sides of a comparison, each in a process of its own as its users run it, taking steps in
turn. Linux only.

    with Worker("peft", Case(dropout=0.05)) as peft, Worker("lorafold", Case(dropout=0.05)) as ours:
        ours.step(); peft.step()

`python -m lib.worker PEER CASE` is the process: it builds its model, takes a step for every line on
stdin and answers with a JSON object.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

from lib.finished import paths
from lib.short import is_short
from lib.work import Work, none, of_loss, of_model, same_work, stepping

# of the two operands of a large product and of the product, by the kind of device
SHAPES = {
    "cpu": ((1024, 1536), (1536, 1536), (1024, 1536)),
    "cuda": ((8192, 8192), (8192, 8192), (8192, 8192)),
}


class Case(NamedTuple):
    """What both sides train: LoRA or DoRA on every linear of the blocks of a model in bf16, experts
    among them (PEFT's `target_parameters`), AdamW, every token labelled.

    lorafold alone trains any `method` of the table with its own options and targets, and has the
    objective "classify" (two classes, one label a row) beside "sft".
    """

    batch: int = 4
    length: int = 256
    rank: int = 16
    dropout: float = 0.0
    dora: bool = False
    quantization: str | None = None
    model: str = "smollm2"  # or a directory
    method: str | None = None
    objective: str = "sft"
    recompute: bool = False  # gradient checkpointing
    device: str = "cpu"
    products: int = 1 if is_short() else 15  # timed after each step
    peft_dtype: str = "bfloat16"  # of PEFT's base and products; lorafold picks the faster one


class Step(NamedTuple):
    """Seconds of a step's parts, the most bytes that the process has been resident in until its
    end, on a GPU that tensors have taken there, FLOP/s of a product after it, and all that was
    computed until its end (`lib.work`).
    """

    forward: float
    backward: float
    optimizer: float
    peak: int
    gemm: float
    work: Work

    @property
    def seconds(self) -> float:
        return self.forward + self.backward + self.optimizer


class Worker:
    """A process that takes steps of `peer` (lorafold or peft) on `case`."""

    def __init__(self, peer: str, case: Case) -> None:
        command = [sys.executable, "-m", "lib.worker", peer, json.dumps(case._asdict())]
        environment = {**os.environ, "PYTHONPATH": paths()}
        pipe = subprocess.PIPE
        self.child = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment
        )

    def step(self) -> Step:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write("\n")
        self.child.stdin.flush()
        if not (line := self.child.stdout.readline()):
            sys.exit(f"{' '.join(map(str, self.child.args))}: the process ended")
        return Step(**json.loads(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.kill()
        self.child.wait()


def in_turn(workers: Mapping[str, Worker], warm_up: int, rounds: int) -> dict[str, list[Step]]:
    """Steps of each worker, the first ones left out; all have computed the same."""
    steps: dict[str, list[Step]] = {name: [] for name in workers}
    for turn in range(warm_up + rounds):
        for name, worker in workers.items():
            step = worker.step()
            if turn >= warm_up:
                steps[name].append(step)
    same_work({name: taken[-1].work for name, taken in steps.items()})
    return steps


def ids(case: Case) -> Any:
    import torch

    return torch.randint(
        1000, 40_000, (case.batch, case.length), generator=torch.Generator().manual_seed(0)
    )


class Training(NamedTuple):
    """A step's loss, its optimizer, what was computed, and what follows the optimizer's step."""

    loss: Callable[[], Any]
    optimizer: Any
    work: Work
    after: Callable[[], None] = lambda: None


def lorafold(case: Case, stack: ExitStack) -> Training:
    """A loss and its optimizer, as `lorafold train` sets them up."""
    import torch
    from rich.console import Console

    import lorafold as lf
    from lorafold.data.classification import LabelledExample
    from lorafold.data.examples import Example
    from lorafold.methods import make_spec
    from lorafold.models.tokenizer import load_tokenizer
    from lorafold.objectives.classify import Classify
    from lorafold.objectives.objective import Objective
    from lorafold.objectives.sft import Sft
    from lorafold.recipe.recipe import Recipe
    from lorafold.resolve import Base
    from lorafold.runtime.memory import KEEP_FREED, malloc_policy
    from lorafold.training_step.fused_modules import fused
    from lorafold.training_step.gradient_checkpointing import enable_gradient_checkpointing
    from lorafold.training_step.optimizers import make_optimizer
    from lorafold.training_step.param_groups import param_groups

    rows, tokenizer = ids(case).tolist(), load_tokenizer("smollm2")
    base = Base(case.model, case.quantization or "bf16", case.device)
    objective: Objective = Sft() if case.objective == "sft" else Classify(("no", "yes"))
    model = objective.load(base, tokenizer)
    stack.enter_context(malloc_policy(KEEP_FREED))
    lora = lf.LoRA(rank=case.rank, dropout=case.dropout)
    spec = make_spec(case.method) if case.method else lf.DoRA(lora) if case.dora else lora
    saved = objective.modules_to_save(model, spec, None)
    adapter = lf.attach(model, spec, modules_to_save=saved)
    if case.recompute:
        enable_gradient_checkpointing(model)
    stack.enter_context(fused(model))
    loss = stack.enter_context(objective.loss(model, tokenizer, True, Console(quiet=True)))
    examples: list[Any] = [
        Example(tuple(row), tuple(row)) if case.objective == "sft" else LabelledExample(row, i % 2)
        for i, row in enumerate(rows)
    ]
    inputs = loss.collate(examples, torch.device(case.device))
    count = sum(map(loss.count, examples))
    loss.train()
    groups = param_groups(adapter.parts(), spec.lr, spec.lr_b or spec.lr)
    # the 21st of 100 steps and those after it, at which a method may prune
    steps = itertools.count(21)

    work = none()
    of_loss(loss, work)

    def total() -> Any:
        work["rows"] += len(examples)
        found, added = loss(**inputs) / count, spec.penalty(adapter.own_deltas)
        return found if added is None else found + added

    return Training(
        total,
        make_optimizer("adamw", groups, Recipe()),
        work,
        lambda: spec.after_step(adapter.own_deltas, next(steps), 100),
    )


def peft(case: Case, stack: ExitStack) -> Training:
    """A loss and its optimizer, as PEFT's documentation sets them up."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from lorafold.models.sources import resolve_model

    four = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": (dtype := getattr(torch, case.peft_dtype)),
    }
    packing = {"quantization_config": BitsAndBytesConfig(**four)} if case.quantization else {}
    model = AutoModelForCausalLM.from_pretrained(
        resolve_model(case.model).path, dtype=dtype, device_map=case.device, **packing
    )
    config = LoraConfig(
        r=case.rank,
        lora_alpha=2 * case.rank,
        lora_dropout=case.dropout,
        use_dora=case.dora,
        target_modules="all-linear",
        target_parameters=[n for n, p in model.named_parameters() if p.dim() == 3] or None,
    )
    tuned, rows = get_peft_model(model, config).train(), ids(case).to(case.device)
    if case.recompute:
        tuned.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=2e-4)
    work = none()
    of_model(tuned, work)
    return Training(
        lambda: tuned(input_ids=rows, labels=rows, use_cache=False).loss, optimizer, work
    )


def peak(device: str) -> int:
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated()
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def now(device: str) -> float:
    """The time at which all that was asked for is done."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


@cache
def operands(device: str) -> list[tuple[Any, ...]]:
    """Two matrices and room for their product, in bf16 and in fp32. They are kept, so that they
    leave no holes in the memory that is measured.
    """
    import torch

    shapes = SHAPES[device]
    return [
        tuple(torch.randn(shape).to(device, dtype) for shape in shapes)
        for dtype in (torch.bfloat16, torch.float32)
    ]


def gemm_rate(device: str, times: int) -> float:
    """FLOP/s of a large product, in bf16 or in fp32: whichever this machine is faster with."""
    import torch

    medians = []
    for a, b, product in operands(device):
        seconds = []
        for _ in range(times):
            start = now(device)
            torch.mm(a, b, out=product)
            seconds.append(now(device) - start)
        medians.append(statistics.median(seconds))
    (n, k), (_, m), _ = SHAPES[device]
    return 2 * n * k * m / min(medians)


def serve(peer: str, case: Case) -> None:
    kind = case.device.partition(":")[0]
    operands(kind)
    with ExitStack() as stack:
        training = {"lorafold": lorafold, "peft": peft}[peer](case, stack)
        stack.enter_context(stepping(training.work))
        for _ in sys.stdin:
            at = [now(kind)]
            loss = training.loss()
            at.append(now(kind))
            loss.backward()
            at.append(now(kind))
            del loss  # as the end of a trainer's step does
            training.optimizer.step()
            training.after()
            training.optimizer.zero_grad()
            at.append(now(kind))
            parts = at[1] - at[0], at[2] - at[1], at[3] - at[2]
            step = Step(*parts, peak(kind), gemm_rate(kind, case.products), training.work)
            print(json.dumps(step._asdict()), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "lorafold":
        from lorafold.runtime.process_tuning import restart_tuned

        restart_tuned()  # as the command does
    serve(sys.argv[1], Case(**json.loads(sys.argv[2])))
