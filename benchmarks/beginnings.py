"""Rows that begin alike, computed once and apart: seconds of a step, and the memory that it takes.

    python benchmarks/beginnings.py [--rounds 5] [--only WORD ...] [--dropout 0.05] [--pays]

SmolLM2-135M in this machine's own storage, LoRA of rank 16 on all linears, ids drawn at
random. Both ways take turns in one process after a warm-up, and the medians are compared; memory is
that of a process of its own each. `bound` is what operations alone would allow, of the blocks and
the head. `--pays` looks for the share in common from which on it is faster: a run computes less
than `data.batches.PAYS` apart.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import psutil
import torch
from lib.results import keep
from lib.short import parsed
from lib.work import Work, same_work, targets
from transformers import PreTrainedModel

import lorafold as lf
from lorafold.core.contexts import evaluating
from lorafold.data import prefix_forest as sharing
from lorafold.data.examples import NO_LOSS, Example
from lorafold.data.preference_examples import BranchedRow
from lorafold.evaluation.batched_losses import batches, row_losses
from lorafold.training_step.fused_modules import fused
from lorafold.training_step.losses import CompletionLoss
from lorafold.training_step.preference_algorithms import Dpo
from lorafold.training_step.preference_loss import Preferences
from lorafold.training_step.shared_prefixes import sharing_prefixes

TOKENS = 8192  # of a packed sequence
CPU = torch.device("cpu")


def drawn(n: int) -> tuple[int, ...]:
    return tuple(torch.randint(1, 40_000, (n,)).tolist())


def trained(head: tuple[int, ...], own: tuple[int, ...]) -> Example:
    """A row that is trained on what is its own."""
    return Example((*head, *own), (NO_LOSS,) * len(head) + own)


def heads(head: int, own: int, rows: int) -> list[Example]:
    first = drawn(head)
    return [trained(first, drawn(own)) for _ in range(rows)]


def turns(rows: int, n: int, asked: int = 40, reasoning: int = 60, said: int = 40) -> list[Example]:
    """Conversations whose template drops the reasoning of earlier turns: an example a turn."""
    found = []
    for _ in range(rows):
        head: tuple[int, ...] = ()
        for _ in range(n):
            head += drawn(asked)
            answer = drawn(said)
            found.append(trained(head, (*drawn(reasoning), *answer)))
            head += answer
    return found


def pairs(system: int, asked: int, own: int, rows: int) -> list[BranchedRow]:
    first = drawn(system)
    return [
        BranchedRow(
            (*first, *(prompt := drawn(asked))), tuple(_branch(prompt, own) for _ in range(2))
        )
        for _ in range(rows)
    ]


def _branch(prompt: tuple[int, ...], own: int) -> Example:
    ids = drawn(own)
    return Example((prompt[-1], *ids), (NO_LOSS, *ids))


SFT = {
    "8 rows with a shared prefix of 400 tokens and 100 of their own": lambda: heads(400, 100, 8),
    "chat: 8 rows with a system prompt of 60 tokens and 120 of their own": lambda: heads(
        60, 120, 8
    ),
    "8 rows of 200 tokens, nothing shared": lambda: heads(0, 200, 8),
    "2 conversations of 6 turns, one example per turn": lambda: turns(2, 6),
}
PAYS = {
    f"8 rows with a shared prefix of {head} tokens and {200 - head} of their own": partial(
        heads, head, 200 - head, 8
    )
    for head in (4, 8, 16, 32, 64)
}
PAIRS = "DPO: 4 pairs with a system prompt of 300 tokens, prompts of 40, answers of 80"
OWN = f"{PAIRS}; compared with pairs that share only their own prompt"
QUESTIONS = 32
CHOICE = f"multiple choice: 4 answers of 20 tokens for each of {QUESTIONS} questions of 300"


def ways(
    what: str, model: PreTrainedModel, stack: ExitStack
) -> tuple[int, int, list[Callable[[], Work]]]:
    """The tokens that are computed apart and once, and a step either way, which counts its work."""
    torch.manual_seed(0)
    if what == CHOICE:
        rows = [e for _ in range(QUESTIONS) for e in heads(300, 20, 4)]

        def padded() -> Work:
            done = 0
            loss = CompletionLoss(model, False, 0)
            with evaluating(loss), fused(model):
                for group in batches(rows):
                    done += len(loss.by_row([rows[i] for i in group]))
            return {"rows": done}

        def alike() -> Work:
            return {"rows": len(row_losses(model, rows, lambda done, total: None))}

        once = QUESTIONS * (300 + 4 * 20)
        return sum(len(e.ids) for e in rows), once, [padded, alike]
    how = stack.enter_context(sharing_prefixes(model, across=True))
    stack.enter_context(fused(model))
    if what in (PAIRS, OWN):
        given = pairs(300, 40, 80, 4)
        losses = [Preferences(model, Dpo(), how, 0, TOKENS)] * 2
    else:
        given = (SFT | PAYS)[what]()
        losses = [CompletionLoss(model, True, 0), CompletionLoss(model, True, 0, how)]

    def step(loss: CompletionLoss | Preferences, across: bool) -> Work:
        work = {"rows": 0, "targets": 0}
        how.across, how.shares = across, across or what == OWN
        for part in loss.micro_batches(given, 1, TOKENS):
            inputs = loss.collate([given[i] for i in part], CPU)
            work["rows"] += len(part)
            work["targets"] += targets(**inputs)
            loss(**inputs).backward()
        model.zero_grad()
        return work

    def computed(loss: CompletionLoss | Preferences, across: bool) -> int:
        how.across, how.shares = across, across or what == OWN
        parts = loss.micro_batches(given, 1, TOKENS)
        return sum(loss.computed([given[i] for i in part]) for part in parts)

    both = [*zip(losses, (False, True), strict=True)]
    apart, once = (computed(*way) for way in both)
    return apart, once, [partial(step, *way) for way in both]


def loaded(dropout: float) -> object:
    model = lf.load_model("smollm2", device="cpu")
    lf.attach(model, lf.LoRA(rank=16, dropout=dropout))
    return model.train()


def peak(what: str, way: int, dropout: float) -> float:
    """The largest resident memory of a process over that before its steps, in GB."""
    command = [sys.executable, __file__, "--one", what, str(way), "--dropout", str(dropout)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def one(what: str, way: int, dropout: float) -> None:
    """Print the memory of one step, by the kernel's own mark, which is set back before it."""
    with ExitStack() as stack:
        model = loaded(dropout)
        *_, steps = ways(what, model, stack)
        before = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")
        steps[way]()
        status = Path("/proc/self/status").read_text()
        most = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    print(json.dumps((most - before) / 1e9))


def rows(asked: argparse.Namespace) -> Iterator[dict]:
    if asked.pays:
        sharing.MAX_SIZE = 0.0
    for what in PAYS if asked.pays else (*SFT, PAIRS, OWN, CHOICE):
        if not any(word in what for word in asked.only):
            continue
        with ExitStack() as stack:
            apart, once, steps = ways(what, loaded(asked.dropout), stack)
            seconds: list[list[float]] = [[], []]
            work: list[Work] = [{}, {}]
            for n in range(asked.rounds + 1):
                for way, (step, found) in enumerate(zip(steps, seconds, strict=True)):
                    start = time.perf_counter()
                    work[way] = step()
                    if n:
                        found.append(time.perf_counter() - start)
            same_work(dict(zip(("apart", "once"), work, strict=True)))
        first, second = map(statistics.median, seconds)
        memory = [1.0] * 2 if asked.pays else [peak(what, way, asked.dropout) for way in range(2)]
        row = {
            "rows": what, "tokens, separate": apart, "tokens, shared": once,
            "share": f"{once / apart:.0%}",
            "seconds, separate": first, "seconds, shared": second, "speed-up": first / second,
            "relative memory": memory[1] / memory[0],
        }  # fmt: skip
        print(row, flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[""], help="words in the names of rows")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--pays", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parsed(parser, rounds=1, only=["conversations", "choice"])
    if asked.one:
        one(asked.one[0], int(asked.one[1]), asked.dropout)
        return
    keep("beginnings_pays" if asked.pays else "beginnings", list(rows(asked)), dtypes="bf16")


if __name__ == "__main__":
    main()
