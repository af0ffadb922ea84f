"""Worked solutions of generated arithmetic problems, from reasoning-gym, which is in the `bench`
extra. A short form has the quickstart's requests in their place, with a number in each answer.
"""

import sys
from typing import Any

from lib.short import is_short


def gym(task: str, seed: int, **options: Any) -> Any:
    """The data set of a task of reasoning-gym; ends the program where that is not installed. Its
    item n is drawn with seed + n, so that those of small seeds would be the same.
    """
    try:
        from reasoning_gym import create_dataset
    except ImportError:
        sys.exit("reasoning-gym is not installed; run: pip install 'lorafold[bench]'")
    return create_dataset(task, seed=seed * 1_000_000, **options)


def problems(n: int, seed: int) -> list[tuple[str, str]]:
    """Questions and their solutions, worked."""
    if is_short():
        from lorafold.quickstart.task import rows

        made = rows("test" if seed else "train", n, 0)
        texts = [(row["prompt"][-1]["content"], row["completion"][0]["content"]) for row in made]
        return [(asked, f"{at}: {said}") for at, (asked, said) in enumerate(texts)]
    found = gym("gsm_symbolic", size=n, seed=seed)
    return [(item["question"], item["metadata"]["answer_cot"]) for item in found]
