"""What a policy costs the skill that it lies over: SFT, then GRPO on a part of it, with a beta.

    python benchmarks/policy_skill.py [--steps 16] [--beta 0 0.05]

The skill is the quickstart's: everyday requests become JSON, six intents. An adapter learns all of
them from 240 rows, by SFT. A policy over it draws completions for requests of two intents, music
and weather, whose reward is the share of right fields. Measured by exact match on unseen rows,
greedy: the intents that were rewarded, and the other four, which the policy should keep. The bytes
of the SFT adapter are compared before and after.
Prints a table, which is also written to results/.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

from lib.finished import finished
from lib.results import keep
from lib.short import parsed

from lorafold.quickstart.task import rows

REWARDED = ("music", "weather")
FIELDS = '''
import json

def fields(completion, answer):
    """The share of the answer's fields that the completion has, with nothing besides."""
    wanted = json.loads(answer)
    try:
        found = json.loads(completion)
    except ValueError:
        return 0.0
    if not isinstance(found, dict):
        return 0.0
    right = sum(found.get(key) == value for key, value in wanted.items())
    return right / len({*wanted, *found})
'''
LORAFOLD = [sys.executable, "-m", "lorafold"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--sft-steps", type=int, default=24)
    parser.add_argument("--held-out", type=int, default=300)
    parser.add_argument("--beta", type=float, nargs="+", default=[0.0, 0.05])
    asked = parsed(parser, steps=1, sft_steps=1, held_out=8, beta=[0.05])
    with tempfile.TemporaryDirectory() as scratch:
        skill = written(scratch, "skill", rows("train", 240, 0))
        prompts = written(scratch, "prompts", of(rows("train", 600, 1), True))
        tests = {
            "rewarded requests": written(scratch, "own", of(rows("test", asked.held_out, 2), True)),
            "other requests": written(scratch, "other", of(rows("test", asked.held_out, 2), False)),
        }
        reward, sft = Path(scratch, "reward.py"), f"{scratch}/sft"
        reward.write_text(FIELDS)
        train(skill, sft, "--steps", str(asked.sft_steps))
        table = [measured("SFT", ["--adapter", sft], tests)]
        for beta in asked.beta:
            before, out = digest(sft), f"{scratch}/policy"
            done = train(
                *(prompts, out, "--objective", "grpo", "--over", sft, "--overwrite"),
                *("--reward", f"{reward}:fields", "--steps", str(asked.steps), "--beta", str(beta)),
                *("--objective-options", "group=8", "--objective-options", "max_new_tokens=64"),
            )
            adapters = ["--adapter", sft, "--adapter", out]
            found = measured(f"GRPO on top of it, beta {beta:g}", adapters, tests)
            steps = json.loads(Path(out, "lorafold.json").read_text())["steps"]
            table.append(
                found
                | {
                    "reward of the first and the last 4 steps": " to ".join(
                        f"{sum(part) / len(part):.3f}"
                        for part in (steps["reward"][:4], steps["reward"][-4:])
                    ),
                    "bytes of the reference": "as before" if digest(sft) == before else "CHANGED",
                    "minutes": done / 60,
                }
            )
    keep("policy_skill", table, dtypes="bf16")


def of(found: list[dict], rewarded: bool) -> list[dict]:
    """Those of the rewarded intents, or the others."""
    intent = [json.loads(row["completion"][0]["content"])["intent"] for row in found]
    return [row for row, own in zip(found, intent, strict=True) if (own in REWARDED) == rewarded]


def written(scratch: str, name: str, found: list[dict]) -> str:
    """A file of rows."""
    path = Path(scratch, f"{name}.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def train(data: str, out: str, *options: str) -> float:
    """Train an adapter; the seconds that it took."""
    command = ["train", "--model", "smollm2", "--storage", "bf16", "--data", data, "--out", out]
    done = finished([*LORAFOLD, *command, "--json", *options])
    print(done.told[-300:], flush=True)
    return done.seconds


def measured(name: str, adapters: list[str], tests: dict[str, str]) -> dict:
    """The exact match on each file, with its interval."""
    found = {"adapters": name}
    for what, test in tests.items():
        asked = ["eval", "--model", "smollm2", "--storage", "bf16", "--data", test, *adapters]
        said = finished([*LORAFOLD, *asked, "--json"]).said
        low, high = said["exact_match_interval"]
        found[what] = f"{said['exact_match']:.1%} ({low:.1%} to {high:.1%})"
    print(json.dumps(found), flush=True)
    return found


def digest(directory: str) -> str:
    """The SHA-256 over every file of a directory."""
    files = sorted(p for p in Path(directory).rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()


if __name__ == "__main__":
    main()
