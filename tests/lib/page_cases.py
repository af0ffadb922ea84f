"""Reports of many methods, defences and rewards, whose figures are drawn at random, for what tests
see of pages: names that are long, figures that lie close, and some that are missing.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from lorafold.comparing import report as comparing
from lorafold.comparing.measure import BASE, Measurement
from lorafold.fragility_study import report as undoing
from lorafold.fragility_study.defences import DEFENCES
from lorafold.fragility_study.measure import RefusalMetrics, StackMetrics
from lorafold.fragility_study.result import Fragility, Point, TuningSetting
from lorafold.inspecting import history_page
from lorafold.inspecting.history import History
from lorafold.memory import estimate_report as memory
from lorafold.memory.estimate import TERMS, Estimate
from lorafold.methods import METHODS

LONG = r"a reward with a long $name$ & <more>"
CHINESE = "检查回答是否使用中文并且没有任何语法错误的奖励函数"


def compared(path: Path, names: tuple[str, ...], rewards: bool = False) -> None:
    chance = random.Random(1)
    found = []
    for n, name in enumerate((BASE, *names)):
        losses = tuple((chance.gauss(3 if name == BASE else 0.4 + 0.02 * n, 0.3) * 5, 5)
                       for _ in range(40))  # fmt: skip
        mean = sum(s for s, _ in losses) / 200
        quality = {"reward": mean, "prompt_rewards": tuple(s / 5 for s, _ in losses)}
        of = Measurement(name, 0, **quality if rewards else {"loss": mean, "row_losses": losses})
        merges = n % 3 > 0
        cost = {} if name == BASE else {
            "trainable_parameters": int(10 ** chance.uniform(4, 8)),
            "trainable_share": 0.01, "adapter_bytes": 10**6, "tokens_per_second": 1000.0,
            "peak_bytes": 10**9, "train_seconds": 100.0, "forgetting_loss": 0.01,
            "forgetting_kl": 10 ** chance.uniform(-4, 0), "mergeable": merges,
            "latency_attached": chance.uniform(1, 2.5), "prefill_attached": chance.uniform(1, 2),
            "latency_merged": chance.uniform(1, 1.1) if merges else None,
            "prefill_merged": chance.uniform(1, 1.1) if merges else None,
            "modifies_architecture": not merges,
        }  # fmt: skip
        found.append(Measurement(**vars(of) | cost))
    comparing.page(found, "Methods on smollm2, rows.jsonl", path)


def undone(path: Path) -> None:
    def state(odds: float) -> RefusalMetrics:
        share = max(0.0, min(1.0, odds / 3))
        reach = (max(0.0, share - 0.2), min(1.0, share + 0.2))
        around = (odds - 0.4, odds + 0.4)
        return RefusalMetrics(odds, around, share, reach, 0.02, (0.0, 0.1), 0.03, 1.234)

    before = StackMetrics(state(2.9), state(-1.0))
    points = tuple(
        Point(TuningSetting("policy", defence, 8, 2e-4), 0, k, before.kept(odds), state(odds), None)
        for n, defence in enumerate(DEFENCES)
        for k in (2, 4, 8, 16, 32, 64)
        for odds in [2.9 - (0.4 + 0.1 * n) * k**0.5]
    )
    found = Fragility("smollm2", "benign.jsonl", {"policy": before}, points)
    undoing.page(found, path)


def drawn(path: Path, names: Sequence[str] = (LONG, "short", "letters")) -> None:
    chance = random.Random(2)

    def walk(start: float, step: float) -> list[float]:
        return [start + step * n + chance.gauss(0, abs(start) / 5 + 0.02) for n in range(200)]

    steps = {
        "reward": walk(0.2, 0.003), **{f"reward {name}": walk(0.1, 0.001) for name in names},
        "tokens a completion": walk(80, -0.2), "cut off": [0.0] * 200,
        "entropy": walk(1.2, -0.004), "mismatch": walk(0.001, 0), "largest mismatch": walk(0.01, 0),
    }  # fmt: skip
    measured = [0.2, 0.45, 0.6, 0.7]
    held_out = {
        "step": [0, 50, 100, 200], "reward": measured,
        "reward_interval": [(v - 0.1, v + 0.1) for v in measured],
    }  # fmt: skip
    said = {"where": "row 3", "prompt": "Say red", "completion": "red " * 60, "reward": 0.7,
            "ended": False, "each": {names[0]: 0.2}}  # fmt: skip
    sides = {"first": {"step": 0, "samples": [said]}, "last": {"step": 200, "samples": [said] * 2}}
    found = History(
        "policy", {"objective": "grpo", "method": "lora"}, walk(0.01, 0), steps,
        {step: -reward for step, reward in zip(held_out["step"], measured, strict=True)}, held_out,
        dict.fromkeys(names, 0.5), sides, ["The entropy fell by 60%."],
    )  # fmt: skip
    history_page.page(found, path)


def learned(path: Path, steps: int = 120) -> None:
    losses = [3 * 0.97**n + 0.3 for n in range(steps)]
    recipe = {"objective": "sft", "method": "lora"}
    evals = {n: losses[n - 1] + 0.05 for n in range(40, steps + 1, 40)}
    found = History("adapter", recipe, losses, {}, evals, {}, {}, {}, [])
    history_page.page(found, path)


def estimated(path: Path) -> None:
    found = Estimate({name: 3**n * 10**6 for n, name in enumerate(TERMS)})
    said = ["does not fit: 8.0 GB short", "no single change would make it fit"]
    memory.page(found, "lora of smollm2, 4 x 512 tokens", path, said, 24 * 10**9)


PAGES: dict[str, Callable[[Path], None]] = {
    "all methods": lambda path: compared(path, tuple(METHODS)),
    "compare": lambda path: compared(path, tuple(METHODS)[:8]),
    "long names": lambda path: compared(path, tuple(f"{LONG} {n}" for n in range(12))),
    "Chinese names": lambda path: compared(path, tuple(f"{CHINESE}{n}" for n in range(8))),
    "rewards": lambda path: compared(path, ("lora", "dora", "ia3"), rewards=True),
    "fragility": undone,
    "policy": drawn,
    "many rewards": lambda path: drawn(path, tuple(f"{LONG} {n}" for n in range(12))),
    "Chinese rewards": lambda path: drawn(path, (f"{CHINESE}一", "short", f"{CHINESE}二")),
    "train": learned,
    "one step": lambda path: learned(path, 1),
    "estimate": estimated,
}
