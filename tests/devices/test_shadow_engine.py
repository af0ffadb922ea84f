"""The engine answers on a GPU what it answers on the CPU, and waits for its tokens alone."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import lorafold as lf
from device_cases import away_from_start, base, engines_know_shadows, llama, mixtral, on_device
from lorafold.engine import Engine, Request, Sampling
from lorafold.methods import make_spec
from shadow import Count

MIXED = ("lora", "dora", "ia3", "loha", "houlsby", "vera", "prompt", None)


@pytest.fixture(autouse=True)
def in_this_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    engines_know_shadows(monkeypatch)


def saved(config: Any, storage: str, methods: Sequence[str | None], out: Path) -> dict[str, Path]:
    """An adapter for each method that is one, by a name of its own, away from its start."""
    model, found = base(config, storage, False), {}
    for i, method in enumerate(methods):
        if method is not None:
            adapter = lf.attach(model, make_spec(method), name="saved")
            away_from_start(adapter, 0.05 * (i + 1))
            found[f"{method}{i}"] = adapter.save(out / f"{method}{i}")
            adapter.detach()
    return found


def answers(
    config: Any, storage: str, adapters: dict[str, Path], methods: Sequence[str | None],
    there: bool, sampling: Sampling,
) -> tuple[list[list[int]], Count]:  # fmt: skip
    """The tokens for each method, and the cost of the second step that decodes them all."""
    found, decoded = Count(), 0
    with ExitStack() as stack:
        device = stack.enter_context(on_device()) if there else None
        model = base(config, storage, there)
        engine = stack.enter_context(Engine(model, slots=len(methods), length=64, chunk=16))
        for name, path in adapters.items():
            engine.load(name, path)
        streams = [
            engine.submit(
                Request(str(i), tuple(range(5, 12 + 3 * i)), 6, method and f"{method}{i}", sampling)
            )
            for i, method in enumerate(methods)
        ]
        for _ in range(60):
            running = engine._scheduler.running
            decodes = len(running) == len(methods) and all(row.num_pending == 1 for row in running)
            decoded += decodes
            with ExitStack() as step:
                if device is not None and decodes and decoded == 2:
                    found = step.enter_context(device.counting())
                going = engine.step()
            if not going:
                break
        results = [stream.result() for stream in streams]
        assert all(r.reason != "failed" for r in results), [r.message for r in results]
        return [list(r.tokens) for r in results], found


@pytest.mark.few(2)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=1)],
                         ids=["greedy", "sampled"])  # fmt: skip
@pytest.mark.parametrize("storage", ["fp32", "nf4"])
@pytest.mark.parametrize("config", [llama, mixtral], ids=lambda c: c.__name__)
def test_mixed_adapters(config: Any, storage: str, sampling: Sampling, tmp_path: Path) -> None:
    methods = MIXED if config is llama else ("lora", "ia3", None)
    adapters = saved(config(), storage, methods, tmp_path)
    given = config(), storage, adapters, methods
    found, _ = answers(*given, True, sampling)
    expected, _ = answers(*given, False, sampling)
    if storage == "fp32":
        assert found == expected
    else:  # where two tokens are as likely, roundings decide
        same = [a == b for a, b in zip(found, expected, strict=True)]
        assert sum(same) >= len(same) // 2, (found, expected)


BUDGETS = {  # synchronizations of a step that decodes, launches of a block
    "lora": (("lora",) * 4, 1, 42),
    "dora": (("dora",) * 4, 1, 49),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_a_step_that_decodes_costs_no_more_than_its_budget(name: str, tmp_path: Path) -> None:
    methods, waits, launches = BUDGETS[name]
    counts = []
    for blocks in (1, 2):
        adapters = saved(llama(blocks), "bf16", methods, tmp_path / str(blocks))
        counts.append(answers(llama(blocks), "bf16", adapters, methods, True, Sampling())[1])
    one, two = counts
    assert two.synchronizations.total() <= waits, two.told()
    block = two.launches - one.launches
    assert block.total() <= launches, (block.total(), (two.lines - one.lines).most_common(40))
