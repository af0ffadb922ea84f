"""The quickstart task: strict JSON, deterministic, and a test split of words that training never
shows.
"""

import json
import re
from functools import cache

import pytest

from lorafold.quickstart.task import INTENTS, NUMBERS, SYSTEM, Row, Split, rows

COPIED = ("place", "task", "to", "text", "title", "artist", "city")
FIXED = (  # the words of the patterns
    "the i will be have to my your no aunt uncle coach mr ms dr dj band"
    " cafe chez port lake new mount fort"
)
GLUE = set(FIXED.split())


def request(row: Row) -> str:
    return row["prompt"][1]["content"]


def record(row: Row) -> dict[str, str | int]:
    return json.loads(row["completion"][0]["content"])


@cache
def records(split: Split) -> list[dict[str, str | int]]:
    return [record(row) for row in rows(split, 3000, 0)]


def copied(split: Split) -> list[str]:
    found = [item for row in rows(split, 4000, 7) for item in record(row).items()]
    return [str(value) for key, value in found if key in COPIED]


def vocabulary(values: list[str]) -> set[str]:
    return {word for value in values for word in re.findall(r"\w+", value.lower())} - GLUE


def test_rows_are_strict_json_with_fixed_key_order() -> None:
    for row in rows("train", 400, 0):
        system, user = row["prompt"]
        assert (system["role"], system["content"], user["role"]) == ("system", SYSTEM, "user")
        (answer,) = row["completion"]
        found = json.loads(answer["content"])
        assert list(found) == ["intent", *INTENTS[found["intent"]].slots]
        assert answer["content"] == json.dumps(found, separators=(",", ":"))


def test_copied_values_stand_in_the_request() -> None:
    for row in rows("train", 400, 1):
        for key, value in record(row).items():
            if key in COPIED:
                assert str(value) in request(row)
        assert not re.search(r"[<>()|]", request(row))


def test_same_arguments_same_rows_and_another_seed_others() -> None:
    assert rows("train", 50, 3) == rows("train", 50, 3)
    assert rows("train", 50, 3) != rows("train", 50, 4)


def test_test_split_has_no_value_and_no_word_of_a_value_from_training() -> None:
    train, test = copied("train"), copied("test")
    assert not set(train) & set(test)
    assert not vocabulary(train) & vocabulary(test)
    assert len(vocabulary(test)) > 100


def test_no_request_twice_and_thousands_of_them() -> None:
    train, test = ([request(row) for row in rows(split, 5000, 0)] for split in ("train", "test"))
    assert len({*train, *test}) == 10_000


def test_intents_are_balanced() -> None:
    names = [record(row)["intent"] for row in rows("test", 6 * 25, 0)]
    assert {names.count(name) for name in INTENTS} == {25}


@pytest.mark.parametrize("key", ["time", "day", "people"])
def test_every_normalised_value_of_the_test_split_is_taught(key: str) -> None:
    seen, taught = ({of[key] for of in records(s) if key in of} for s in ("test", "train"))
    assert seen <= taught


def test_numbers_and_times_agree_with_what_was_said() -> None:
    numbers = list(NUMBERS)
    checked = 0
    for row in rows("train", 2000, 5):
        text, found = request(row).lower(), record(row)
        if spoken := re.search(r"(\d+)(?::(\d+))?(am|pm)", text):
            hour, minute, half = spoken.groups()
            assert found["time"] == f"{hour}:{minute or '00'} {half}"
        elif spoken := re.search(r"(half past )?(\w+) in the (morning|evening)", text):
            half, hour, period = spoken.groups()
            minutes, when = "30" if half else "00", "pm" if period == "evening" else "am"
            assert found["time"] == f"{numbers.index(hour) + 1}:{minutes} {when}"
        else:
            assert "time" not in found
            continue
        checked += 1
    assert checked > 500
