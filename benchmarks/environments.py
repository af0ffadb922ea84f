"""Whether rewards rise in environments: a game of several turns, and tools.

    python benchmarks/environments.py [--only guess tools] [--steps 40]

guess: the model guesses a number, and is told whether it is higher or lower (examples/guess.py);
the reward is 1 for the first guess, 0.2 less for each further one, and 0 without success.
verifiers: a game of the `verifiers` package, in a virtual environment of its own, whose Python the
variable VERIFIERS names (examples/verifiers_game.py); the reward is 1 if one of four guesses hits.
tools: a start from SFT on a few conversations that call the tools of examples/calculator.py, then
GRPO; the reward is 1 if the last answer has the right number. Measured on unseen rows before and
after the policy, with 95% intervals; the paired difference is over the same rows.
"""

import argparse
import json
import random
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from lib.results import keep
from lib.short import parsed

import lorafold as lf

EXAMPLES = Path(__file__).parents[1] / "examples"
RIGHT = '''
import re

def right(completion, answer):
    """Whether the last number is the answer."""
    numbers = re.findall(r"\\d+", completion)
    return bool(numbers) and numbers[-1] == answer
'''


def sums(n: int, seed: int) -> list[dict[str, Any]]:
    rng, found = random.Random(seed), []
    for _ in range(n):
        name, word = rng.choice([("add", "plus"), ("multiply", "times")])
        a, b = rng.randrange(10, 100), rng.randrange(10, 100)
        answer = str(a + b if name == "add" else a * b)
        found.append({"prompt": f"What is {a} {word} {b}?", "answer": answer, "call": (name, a, b)})
    return found


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """The conversation of a row, as SFT learns it."""
    name, a, b = row["call"]
    call = {"type": "function", "function": {"name": name, "arguments": {"a": a, "b": b}}}
    messages = [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": row["answer"]},
        {"role": "assistant", "content": f"It is {row['answer']}."},
    ]
    return {"messages": messages, "tools": TOOLS}


def tools() -> list[dict[str, Any]]:
    import importlib.util

    from transformers.utils import get_json_schema

    spec = importlib.util.spec_from_file_location("calculator", EXAMPLES / "calculator.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return [get_json_schema(module.add), get_json_schema(module.multiply)]


TOOLS = tools()


def measured(rows: list[dict[str, Any]], environment: str, rewards: Any, **given: Any) -> Any:
    return lf.evaluate(
        "smollm2", rows, environment=environment, rewards=rewards, group=4, max_new_tokens=40,
        storage="bf16", **given,
    )  # fmt: skip


def trained(out: Path, rows: Any, environment: str, rewards: Any, steps: int, **above: Any) -> None:
    options = {"group": 8, "max_new_tokens": 40}
    recipe = lf.Recipe(
        objective="grpo", storage="bf16", steps=steps, batch=4, eval_fraction=0.0, max_length=400,
        lr=1e-4, objective_options=options,
    )  # fmt: skip
    lf.train(
        recipe, model="smollm2", data=rows, environment=environment, rewards=rewards, out=out,
        **above,
    )  # fmt: skip


def compared(name: str, before: Any, after: Any, out: Path) -> dict[str, Any]:
    pairs = zip(before.prompt_rewards, after.prompt_rewards, strict=True)
    change = [y - x for x, y in pairs]
    mean, half = statistics.mean(change), 1.96 * statistics.stdev(change) / len(change) ** 0.5
    steps = lf.history(out).steps
    turns = steps.get("turns", [1.0])  # recorded where an episode had several
    mismatches = [x for x in steps.get("largest mismatch", []) if x is not None]
    found = {
        "environment": name,
        "reward before": before.reward,
        "after": after.reward,
        "change": mean,
        "95% interval": f"{mean - half:.3f} to {mean + half:.3f}",
        "turns in the first and last step": f"{turns[0]:.2f}, {turns[-1]:.2f}",
        "largest mismatch": max(mismatches, default=None),
    }
    print(json.dumps(found), flush=True)
    return found


def game(name: str, folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    environment, prompt, field = GAMES[name]
    rows = [{"prompt": prompt, field: n % 10} for n in range(400)]
    test = rows[: asked.rows]
    before = measured(test, environment, (), seed=1)
    trained(folder / name, rows, environment, (), asked.steps)
    after = measured(test, environment, (), seed=1, adapters=folder / name)
    return compared(name, before, after, folder / name)


def calculator(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    environment = f"tools:{EXAMPLES}/calculator.py"
    (folder / "reward.py").write_text(RIGHT)
    reward = f"{folder}/reward.py:right"
    sft = lf.Recipe(
        storage="bf16", epochs=1, batch=8, chat_template="tools", eval_fraction=0.0, max_length=600
    )
    lf.train(
        sft, model="smollm2", data=[*map(shown, sums(asked.sft, 2))], out=folder / "sft"
    )
    test = sums(asked.rows, 1)
    before = measured(test, environment, reward, seed=1, adapters=folder / "sft")
    trained(
        folder / "policy", sums(400, 3), environment, reward, asked.steps, over=folder / "sft"
    )
    stack = [folder / "sft", folder / "policy"]
    after = measured(test, environment, reward, seed=1, adapters=stack)
    return compared("tools", before, after, folder / "policy")


GAMES = {
    "guess": (f"{EXAMPLES}/guess.py:Guess", "guess", "secret"),
    "verifiers": (
        f"{EXAMPLES}/verifiers_game.py:rollout", "Guess my number from 0 to 9.", "answer"
    ),
}  # the environment, the prompt and the field with the number
RUNS = {"tools": calculator} | {name: partial(game, name) for name in GAMES}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=RUNS, default=["guess", "tools"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--sft", type=int, default=64)
    asked = parsed(parser, steps=1, rows=2, sft=8)
    with tempfile.TemporaryDirectory() as folder:
        table = [RUNS[name](Path(folder), asked) for name in asked.only]
    keep("environments", table, dtypes="bf16")


if __name__ == "__main__":
    main()
