"""The task of `lorafold quickstart`: a request in everyday language becomes strict JSON.

    "Could you book a table for four at The Copper Lantern on Friday at 8pm"
    -> {"intent":"book","people":4,"place":"The Copper Lantern","day":"Friday","time":"8:00 pm"}

Names, places, errands and messages are copied verbatim; numbers and times are normalized. About a
fifth of the words of each list occur only in the test split. Most values begin with a fixed word
("The", "Lake"), because a word has other tokens after an opening quote than after a space.
"""

import json
import random
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import yaml

Split = Literal["train", "test"]
Message = dict[str, str]
Row = dict[str, list[Message]]
Slot = Callable[[random.Random, Split], tuple[str, str | int]]  # (as spoken, as recorded)

SYSTEM = "JSON"
TEXTS = yaml.safe_load(Path(__file__).with_name("task.yaml").read_text(encoding="utf-8"))
WORDS = {name: tuple(text.split()) for name, text in TEXTS["words"].items()}
NUMBERS, DAYS = WORDS["numbers"], WORDS["days"]


def words_of_split(words: tuple[str, ...], split: Split) -> tuple[str, ...]:
    """Returns the words that belong to a split. A hash assigns a fifth of the words to the test
    split, so that a word is in the same split in every list.
    """
    is_test = {word: zlib.crc32(word.lower().encode()) % 5 == 0 for word in words}
    return tuple(word for word in words if is_test[word] == (split == "test"))


def fill(text: str, value: Callable[[str], str]) -> str:
    """Replaces each `<name>` in a text by the name's value."""
    return re.sub(r"<(\w+)>", lambda name: value(name[1]), text)


def pattern_slot(patterns: Sequence[str]) -> Slot:
    """Returns a slot whose value is copied verbatim: a random pattern with random words."""

    def draw(rng: random.Random, split: Split) -> tuple[str, str]:
        pattern = rng.choice(patterns)
        value = fill(pattern, lambda name: rng.choice(words_of_split(WORDS[name], split)))
        return value, value

    return draw


def number(low: int, high: int) -> Slot:
    """Returns a slot for an integer, which is spoken in digits or, below ten, also in words."""

    def draw(rng: random.Random, split: Split) -> tuple[str, int]:
        value = rng.randint(low, high)
        in_words = value <= len(NUMBERS) and rng.random() < 0.6
        return NUMBERS[value - 1] if in_words else str(value), value

    return draw


def day(rng: random.Random, split: Split) -> tuple[str, str]:
    value = rng.choice([*DAYS, "today", "tomorrow"])
    return (f"on {value}" if value in DAYS else value), value


def clock(rng: random.Random, split: Split) -> tuple[str, str]:
    """Samples a time, spoken as "8pm", "8:30pm", "eight in the evening" or "half past eight in the
    evening", and recorded as "8:00 pm" or "8:30 pm".
    """
    hour = rng.choice((6, 7, 8, 9))
    minutes, am_pm = rng.choice((("00", "am"), ("30", "am"), ("00", "pm"), ("30", "pm")))
    past = minutes == "30"
    spoken = f"{hour}{':30' * past}{am_pm}"
    if rng.random() < 0.3:
        when = "morning" if am_pm == "am" else "evening"
        spoken = f"{'half past ' * past}{NUMBERS[hour - 1]} in the {when}"
    return spoken, f"{hour}:{minutes} {am_pm}"


SLOTS: dict[str, Slot] = {
    "day": day,
    "clock": clock,
    "party": number(2, 9),
    "amount": number(2, 99),
    **{name: pattern_slot(patterns) for name, patterns in TEXTS["patterns"].items()},
}
INTENTS = TEXTS["intents"]


def rows(split: Split, n: int, seed: int) -> list[Row]:
    """Samples `n` different rows of prompt and completion, balanced over the intents."""
    rng = random.Random(f"{split} {seed}")
    rows_by_request: dict[str, Row] = {}
    names = list(INTENTS)
    while len(rows_by_request) < n:
        request, completion = _draw(names[len(rows_by_request) % len(names)], rng, split)
        rows_by_request[request] = {
            "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": request}],
            "completion": [{"role": "assistant", "content": completion}],
        }
    result = list(rows_by_request.values())
    rng.shuffle(result)
    return result


def _draw(name: str, rng: random.Random, split: Split) -> tuple[str, str]:
    intent = INTENTS[name]
    values = {key: SLOTS[slot](rng, split) for key, slot in intent["slots"].items()}
    openings = [TEXTS["openings"] + request for request in intent["requests"]]
    phrasing = rng.choice([*openings, *intent.get("sentences", ())]) + TEXTS["closings"]
    phrasing = re.sub(r"\(([^()]*)\)", lambda choice: rng.choice(choice[1].split("|")), phrasing)
    request = fill(phrasing, lambda key: str(values[key][0]))
    if rng.random() < 0.5:
        request = request[0].upper() + request[1:]
    record = {"intent": name, **{key: recorded for key, (_, recorded) in values.items()}}
    return request, json.dumps(record, separators=(",", ":"), ensure_ascii=False)
