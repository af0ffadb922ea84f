"""Is a second question answered as well as a first, by an adapter of single questions?

    python benchmarks/second_turn.py [--data FILE] [--rows 1200] [--steps 150] [--test 100]

Three data sets of single questions: the quickstart's requests, dates that become ISO dates, and
reasoning-gym's `chain_sum`; or FILE, JSON lines of prompt and completion. Each is trained as it is
and joined into conversations of 1 to 3 questions, in the same number of steps. The figures are
exact matches on unseen questions: as the first of a conversation, and as the second, after an
answered one (`second`); with each question afresh, a second question is a first one. `follow-up`
refers back ("And on Sunday?") to an answered request about the weather.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path

from lib.problems import gym
from lib.results import keep
from lib.short import is_short, parsed

import lorafold as lf
from lorafold.quickstart import task

Turn = list[dict[str, str]]
MAX_TURNS = 3
FORMS = ("%B %d, %Y", "%d %B %Y", "the %d of %B in %Y", "%d. %b %y", "%m/%d/%Y")
QUESTIONS = ("When is {}?", "Write {} as a date.", "{}", "My appointment is on {}.")
DAY_NAMES = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def turn(question: str, answer: str) -> Turn:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def requests(split: str, n: int) -> list[Turn]:
    rows = task.rows("train" if split == "train" else "test", n, 0)
    return [turn(row["prompt"][-1]["content"], row["completion"][0]["content"]) for row in rows]


def dates(split: str, n: int) -> list[Turn]:
    draw, found = random.Random(split), {}
    while len(found) < n:
        day = date(1950, 1, 1) + timedelta(draw.randrange(36_000))
        if (day.toordinal() % 5 == 0) == (split == "train"):
            continue  # a fifth of the days is only in the test rows
        form, asked = draw.choice(FORMS), draw.choice(QUESTIONS)
        found[asked.format(day.strftime(form))] = day.isoformat()
    return [turn(question, answer) for question, answer in found.items()]


def sums(split: str, n: int) -> list[Turn]:
    if is_short():
        return requests(split, n)
    options = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
    items = gym("chain_sum", size=n, seed=1 if split == "train" else 2, **options)
    return [turn(item["question"], item["answer"]) for item in items]


def joined(turns: list[Turn], seed: int) -> Iterator[dict]:
    draw, left = random.Random(seed), list(turns)
    while left:
        size = draw.randint(1, MAX_TURNS)
        yield {"messages": [message for one in left[:size] for message in one]}
        left = left[size:]


def follow_ups(turns: list[Turn]) -> list[dict]:
    """Requests about the weather, and a question about another day."""
    draw, found = random.Random(0), []
    for asked, answered in turns:
        record = json.loads(answered["content"])
        if record["intent"] != "weather":
            continue
        day = draw.choice([name for name in DAY_NAMES if name != record["day"]])
        answer = json.dumps(record | {"day": day}, separators=(",", ":"), ensure_ascii=False)
        found.append({"messages": [asked, answered, *turn(f"And on {day}?", answer)]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--sets", nargs="+", default=["requests", "dates", "sums"])
    parser.add_argument("--storage", default="bf16")
    asked, table = parsed(parser, rows=12, steps=2, test=6), []
    sets: dict[str, Callable[[str, int], list[Turn]]] = {
        "requests": requests, "dates": dates, "sums": sums
    }  # fmt: skip
    if asked.data:
        sets = {asked.data.stem: lambda split, n: of_file(asked.data, split, n)}
        asked.sets = [*sets]
    with tempfile.TemporaryDirectory() as scratch:
        for name in asked.sets:
            train, test = sets[name]("train", asked.rows), sets[name]("test", asked.test)
            seconds = [{"messages": [*test[n - 1], *one]} for n, one in enumerate(test)]
            tests = {"first": [{"messages": one} for one in test], "second": seconds}
            if name == "requests":
                tests["follow-up"] = follow_ups(sets[name]("test", 10 * asked.test))[: asked.test]
            for way, rows in {
                "single": [{"messages": one} for one in train],
                "joined": [*joined(train, 0)],
            }.items():
                recipe = lf.Recipe(steps=asked.steps, storage=asked.storage)
                lf.train(recipe, data=rows, out=f"{scratch}/adapter", overwrite=True)
                found = {"data": name, "rows trained as": way}
                for place, some in tests.items():
                    of = lf.evaluate("smollm2", some, adapters=f"{scratch}/adapter")
                    found[place] = of.exact_match
                print(json.dumps(found), flush=True)
                table.append(found)
    keep("second_turn", table, dtypes=asked.storage)


def of_file(path: Path, split: str, n: int) -> list[Turn]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    some = rows[:n] if split == "train" else rows[-n:]
    return [turn(row["prompt"], row["completion"]) for row in some]


if __name__ == "__main__":
    main()
