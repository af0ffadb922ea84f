"""A policy's way on a task with an exact reward: lists of as many things as are asked for.

    python benchmarks/policy_task.py [--seeds 3] [--steps 40] [--task lists] [--storage fp32]
        [-- --rank 1]

A prompt asks for two, three or four things of a kind; an answer is right where it is so many
different words with commas between them and nothing else. `exact` says whether it is (1 or 0), and
`form` and `number`, with 0.3 each, grade what is not: the share of parts that are one word, and how
near their number is. Kinds of held-out prompts are in no prompt that is trained on. With --task the
prompts and the verifier are those of a task of reasoning-gym (`chain_sum` has numbers of one
digit), or `guess`, the game of several turns of examples/guess.py. The embedded model draws 8
prompts x 8 completions of at most 16 tokens a step; figures are the share of right answers (the
verifier's mean) of 200 held-out prompts, one completion each, before the first step and of the
adapter that is kept, with 95% intervals. A step is silent if the rewards of each of its prompts are
equal.
Prints JSON lines and a table, which is also written to results/.
"""

import argparse
import json
import random
import re
import tempfile
from functools import partial
from pathlib import Path

from lib.finished import COUNTED, finished
from lib.problems import gym
from lib.results import keep
from lib.short import parsed

from lorafold.evaluation.intervals import wilson

EXAMPLES = Path(__file__).parents[1] / "examples"
COUNTS = {"two": 2, "three": 3, "four": 4}
ASKED = ("Name {n} {kind}.", "List {n} {kind}.", "Give me {n} {kind}.", "Write down {n} {kind}.")
RULE = "Answer with words and commas alone, as in: red, blue"
KINDS = re.findall(
    r"\w+",
    """animals birds fish flowers trees fruits vegetables colours countries cities rivers
mountains oceans planets metals gems tools toys games sports dances songs instruments books drinks
foods soups desserts spices herbs nuts berries grains breads cheeses meats sauces snacks clothes
shoes hats fabrics shapes letters months days seasons holidays jobs hobbies vehicles boats engines
machines rooms buildings houses bridges roads parks gardens farms forests deserts islands lakes
beaches storms winds clouds insects spiders snakes lizards frogs dogs cats horses cows pets bones
organs muscles senses emotions languages poems films painters writers kings""",
)
TRAINED = 70  # of the kinds
HELD_OUT = 200  # prompts
REWARD = """
import re

def parts(completion):
    return [part.strip() for part in completion.strip().split(",")]

def exact(completion, wanted):
    own = parts(completion)
    words = all(re.fullmatch("[A-Za-z]+", part) for part in own)
    return words and len({part.lower() for part in own}) == len(own) == wanted

def form(completion):
    own = parts(completion)
    return sum(bool(re.fullmatch("[A-Za-z]+", part)) for part in own) / len(own)

def number(completion, wanted):
    return 1 / (1 + abs(len(set(parts(completion))) - wanted))
"""


def rows(n: int, seed: int, kinds: list[str]) -> list[dict]:
    """Prompts with the number that they ask for."""
    rng, found = random.Random(seed), []
    for _ in range(n):
        word, kind = rng.choice(sorted(COUNTS)), rng.choice(kinds)
        text = f"{rng.choice(ASKED).format(n=word, kind=kind)} {RULE}"
        prompt = [{"role": "user", "content": text}]
        found.append({"prompt": prompt, "wanted": COUNTS[word]})
    return found


def lists(scratch: str, held_out: int = HELD_OUT) -> tuple[list[str], str]:
    """The task of lists: its rewards, and the name of the one that says what is right."""
    kinds = sorted(set(KINDS))
    random.Random(0).shuffle(kinds)
    put(scratch, "train", rows(400, 1, kinds[:TRAINED]))
    put(scratch, "test", rows(held_out, 2, kinds[TRAINED:]))
    file = f"{scratch}/reward.py"
    Path(file).write_text(REWARD)
    named = [f"{file}:exact", f"0.3*{file}:form", f"0.3*{file}:number"]
    return named, f"reward {file}:exact"


def of_reasoning_gym(task: str, scratch: str) -> tuple[list[str], str]:
    """The same of a task of reasoning-gym."""
    small = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    small = small if task == "chain_sum" else {}
    for name, n, seed in (("train", 400, 1), ("test", HELD_OUT, 2)):
        found = gym(task, size=n, seed=seed, **small)
        put(scratch, name, [{"prompt": e["question"], "entry": json.dumps(e)} for e in found])
    return [f"reasoning-gym:{task}"], "reward"


def game(scratch: str) -> tuple[list[str], str]:
    """The same of a game, whose environment gives the reward."""
    for name, n in (("train", 400), ("test", HELD_OUT)):
        put(scratch, name, [{"prompt": "guess", "secret": at % 10} for at in range(n)])
    return [], "reward"


def put(scratch: str, name: str, of: list[dict]) -> None:
    """Write rows to a file."""
    Path(scratch, f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))


def trained(
    scratch: str, seed: int, rewards: list[str], judge: str, asked: argparse.Namespace
) -> dict:
    """The figures of one run."""
    out = f"{scratch}/out"
    options = ["group=8", "max_new_tokens=16", f"updates={asked.updates}"]
    played = ["--environment", f"{EXAMPLES}/guess.py:Guess"] if asked.task == "guess" else []
    done = finished(
        [
            *(*COUNTED, "train", "--model", "smollm2", "--objective"),
            *("grpo", "--data", f"{scratch}/train.jsonl", "--eval-data", f"{scratch}/test.jsonl"),
            *(part for reward in rewards for part in ("--reward", reward)),
            *("--out", out, "--overwrite", "--json"),
            *("--storage", asked.storage, "--batch", "8", "--steps", str(asked.steps), *played),
            *("--eval-every", str(asked.eval_every or asked.steps)),
            *("--seed", str(seed), "--method", asked.method),
            *(part for option in options for part in ("--objective-options", option)),
            *asked.options,
        ]
    )
    record = json.loads(Path(out, "lorafold.json").read_text())
    held_out, steps = record["held_out"], record["steps"]
    right, within = held_out[judge], held_out["reward_interval"]
    kept = held_out["step"].index(record.get("step") or held_out["step"][-1])
    signals = steps["groups without signal"]
    found = {
        "seed": seed, "work": {k: done.said["work"][k] for k in ("steps", "rows")},
        "seconds": done.said["seconds"],
        "whole_seconds": done.seconds,
        "right": [right[0], right[kept]], "interval": [within[0], within[kept]],
        "exact": judge != "reward", "steps": len(signals), "kept": held_out["step"][kept],
        "silent": sum(share == 1 for share in signals) / len(signals),
        "groups without signal": sum(signals) / len(signals),
        "said": [line for line in done.told.splitlines() if "step" in line and ": " in line][-3:],
        "parameters": done.said["trainable_parameters"],
        "tokens": held_out["tokens a completion"], "entropy": steps["entropy"][-1],
        "mismatch": max(x for x in steps["mismatch"] if x is not None),
    }  # fmt: skip
    print(json.dumps(found), flush=True)
    return found


def told(one: dict, at: int) -> str:
    """What is right, with its interval: Wilson's of a share, else that of the mean."""
    share = one["right"][at]
    low, high = wilson(round(HELD_OUT * share), HELD_OUT) if one["exact"] else one["interval"][at]
    return f"{share:.1%} ({low:.1%} to {high:.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--task", default="lists", help="lists, or one of reasoning-gym")
    parser.add_argument("--updates", type=int, default=1)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--storage", default="fp32")
    parser.add_argument("--eval-every", type=int, help="steps; all of them, if not given")
    parser.add_argument("options", nargs="*", help="further ones of `lorafold train`, after --")
    asked = parsed(parser, seeds=1, steps=1)
    table = []
    with tempfile.TemporaryDirectory() as scratch:
        own = {"lists": lists, "guess": game}.get(asked.task, partial(of_reasoning_gym, asked.task))
        made = own(scratch)
        for seed in range(asked.seeds):
            one = trained(scratch, seed, *made, asked)
            table.append(
                {
                    "seed": str(seed),
                    "correct before": told(one, 0),
                    "correct after": told(one, -1),
                    "steps, the best": f"{one['steps']}, {one['kept']}",
                    "silent steps, prompts": f"{one['silent']:.0%}, "
                    f"{one['groups without signal']:.0%}",
                    "minutes of training": f"{one['seconds'] / 60:.1f}",
                    "tokens before and after": " ".join(
                        f"{one['tokens'][at]:.1f}" for at in (0, -1)
                    ),
                    "entropy": f"{one['entropy']:.2f}",
                    "largest mean difference of log-probabilities": f"{one['mismatch']:.1e}",
                }
            )
    keep(f"policy_{asked.task}", table, dtypes=asked.storage)


if __name__ == "__main__":
    main()
