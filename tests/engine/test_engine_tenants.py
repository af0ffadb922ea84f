"""Tenants share an engine by what they are given, not by how much they ask for."""

from collections import Counter

import pytest

from engine_cases import prompt
from lorafold.engine import Ended, Engine, Request


def ask(engine: Engine, tenant: str, n: int, new: int = 8, length: int = 4) -> None:
    for _ in range(n):
        ask.count += 1  # type: ignore[attr-defined]
        id = f"{tenant}{ask.count}"  # type: ignore[attr-defined]
        engine.submit(Request(id, prompt(length, 0), new, tenant=tenant))


ask.count = 0  # type: ignore[attr-defined]


def served(engine: Engine, steps: int) -> Counter[str]:
    """The tokens of each tenant after so many steps."""
    rows = dict(engine._rows)
    for _ in range(steps):
        engine.step()
        rows |= engine._rows
    found: Counter[str] = Counter()
    for row in rows.values():
        found[row.request.tenant] += len(row.tokens) - len(row.request.prompt)
    return found


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_who_always_asks_is_given_by_weight(tiny_model, weight):
    with Engine(tiny_model("llama"), slots=4, weights={"b": weight}) as engine:
        ask(engine, "a", 200)
        ask(engine, "b", 100)
        found = served(engine, 200)
        assert found["b"] / found["a"] == pytest.approx(weight, rel=0.2)


def test_long_requests_give_no_larger_share(tiny_model):
    with Engine(tiny_model("llama"), slots=4) as engine:
        ask(engine, "long", 60, new=32)
        ask(engine, "short", 300, new=4)
        found = served(engine, 250)
        # a prompt counts too: 4 + 2 x 32 a request, and 4 + 2 x 4
        long, short = found["long"] * 68 / 32, found["short"] * 12 / 4
        assert long == pytest.approx(short, rel=0.2)


def test_nobody_saves_up(tiny_model):
    """Who comes later shares from then on, and is not given what it did not ask for before."""
    with Engine(tiny_model("llama"), slots=4) as engine:
        ask(engine, "a", 400)
        served(engine, 100)
        ask(engine, "b", 400)
        before = served(engine, 0)
        after = served(engine, 100)
        given = {tenant: after[tenant] - before[tenant] for tenant in "ab"}
        assert given["b"] == pytest.approx(given["a"], rel=0.3)


def test_one_tenant_runs_in_the_order_it_came(tiny_model):
    with Engine(tiny_model("llama"), slots=1) as engine:
        ended: list[str] = []
        for i in range(6):
            engine.submit(Request(str(i), prompt(3, i), 3))
        rows = list(engine._rows.values())
        while engine._rows:
            engine.step()
            gone = [row.request.id for row in rows if isinstance(row.stream.ended, Ended)]
            ended += [id for id in gone if id not in ended]
        assert ended == [str(i) for i in range(6)]


def test_a_flood_leaves_slots_free(tiny_model):
    with Engine(tiny_model("llama"), slots=8, tenant_slots=6) as engine:
        ask(engine, "flood", 40, new=40)
        engine.step()
        assert len(engine._scheduler.running) == 6
        ask(engine, "small", 1, new=2)
        engine.step()
        assert Counter(r.request.tenant for r in engine._scheduler.running)["small"] == 1
        most = 0
        for _ in range(80):
            engine.step()
            running = Counter(row.request.tenant for row in engine._scheduler.running)
            most = running["flood"]
        assert most == 4  # half of the slots, while another was there lately
        engine.run()
