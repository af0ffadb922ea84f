"""A synthetic function-calling task: a request in everyday language becomes one call.

    "Could you book a table for four at The Copper Lantern on 5 March"
    -> book_table {"place": "The Copper Lantern", "people": 4, "date": "2026-03-05"}

A row offers the function and two others, in random order. There are twelve functions with text,
whole numbers, dates and choices as arguments, each asked for in several phrasings. No call of the
test rows occurs in the training rows, and neither do names, places and errands of its arguments
(`lorafold.quickstart.task`).
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorafold.quickstart.task import SLOTS, TEXTS, Slot, Split, number, pattern_slot

OFFERED = 3  # functions in a row
SYSTEM = "Call one function. It is 2026."
MONTHS = [
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
]
Schema = dict[str, Any]


def date(rng: random.Random, split: Split) -> tuple[str, str]:
    """A day of the year as "5 March" or "March 5" -> "2026-03-05"."""
    month, day = rng.randint(1, 12), rng.randint(1, 28)
    name = MONTHS[month - 1]
    return rng.choice((f"{day} {name}", f"{name} {day}")), f"2026-{month:02}-{day:02}"


def one_of(**spoken: str) -> tuple[Slot, Schema]:
    """A choice: its value in the call, by the words that are said."""

    def draw(rng: random.Random, split: Split) -> tuple[str, str]:
        value, words = rng.choice(list(spoken.items()))
        return words, value

    return draw, {"type": "string", "enum": list(spoken)}


def copied(slot: str) -> tuple[Slot, Schema]:
    """A text that is copied from the request."""
    return (SLOTS | {"thing": THING})[slot], {"type": "string"}


def whole(low: int, high: int) -> tuple[Slot, Schema]:
    """A whole number, said in digits or words."""
    return number(low, high), {"type": "integer"}


DAY: tuple[Slot, Schema] = (date, {"type": "string", "format": "date"})
ROOM = one_of(kitchen="the kitchen", bedroom="the bedroom", office="the office", hall="the hall")
THING = pattern_slot(("<noun> lamp", "<noun> poster", "<noun> mug"))


@dataclass(frozen=True)
class Function:
    """What it does, its arguments with their slots and schemas, and how it is asked for: `(a|b)` is
    a choice and `<slot>` what is said of an argument.
    """

    description: str
    arguments: Mapping[str, tuple[Slot, Schema]]
    requests: tuple[str, ...]


FUNCTIONS = {
    "book_table": Function(
        "Book a table.", {"place": copied("place"), "people": whole(2, 9), "date": DAY},
        ("(book|reserve|get) a table for <people> at <place> on <date>",
         "(book|reserve) <place> for <people> people on <date>")),
    "book_train": Function(
        "Book a train ticket.",
        {"to": copied("city"), "date": DAY,
         "class": one_of(first="first class", second="second class")},
        ("(book|get me|buy) a <class> train ticket to <to> (on|for) <date>",
         "(book|reserve) a train to <to> on <date> in <class>")),
    "get_forecast": Function(
        "Get a weather forecast.", {"city": copied("city"), "date": DAY},
        ("(check|tell me|show me) the (weather|forecast) (for|in) <city> on <date>",
         "(check|tell me) whether it will rain in <city> on <date>")),
    "send_money": Function(
        "Send money.",
        {"to": copied("person"), "amount": whole(2, 99),
         "currency": one_of(EUR="euros", USD="dollars", GBP="pounds")},
        ("(send|pay|transfer) <to> <amount> <currency>",
         "(send|transfer) <amount> <currency> to <to>")),
    "add_reminder": Function(
        "Add a reminder.", {"task": copied("task"), "date": DAY},
        ("remind me to <task> on <date>", "(add|set|make) a reminder for <date> to <task>")),
    "set_heating": Function(
        "Set the heating.", {"room": ROOM, "degrees": whole(15, 25)},
        ("(set|heat|warm) <room> to <degrees> degrees",
         "(make|turn) the heating in <room> <degrees> degrees")),
    "dim_light": Function(
        "Dim a light.", {"room": ROOM, "percent": whole(10, 90)},
        ("dim the (light|lights) in <room> to <percent> percent",
         "(set|turn) the (light|lights) in <room> to <percent>%")),
    "start_timer": Function(
        "Start a timer.", {"minutes": whole(1, 60), "label": copied("task")},
        ("(start|set) a timer of <minutes> minutes to <label>",
         "(set|start) a <minutes> minute timer to <label>")),
    "order_item": Function(
        "Order something.",
        {"item": copied("thing"), "count": whole(1, 9),
         "shipping": one_of(fast="by express", normal="by standard mail")},
        ("(order|buy|get) <count> of the <item> <shipping>",
         "(order|buy) the <item>, <count> of them, <shipping>")),
    "invite": Function(
        "Invite someone.", {"guest": copied("person"), "place": copied("place"), "date": DAY},
        ("invite <guest> to <place> on <date>",
         "(ask|invite) <guest> to come to <place> on <date>")),
    "log_expense": Function(
        "Log an expense.",
        {"amount": whole(2, 99), "date": DAY,
         "category": one_of(food="food", travel="travel", rent="the rent", other="something else")},
        ("(log|note|record) <amount> euros for <category> on <date>",
         "(add|log) an expense of <amount> euros on <date> for <category>")),
    "translate": Function(
        "Translate a text.",
        {"text": copied("task"), "language": one_of(fr="French", de="German", es="Spanish",
                                                 it="Italian")},
        ("translate '<text>' (to|into) <language>", "(say|put) '<text>' in <language>")),
}  # fmt: skip


def rows(split: Split, n: int, seed: int) -> list[dict[str, Any]]:
    """Different rows of messages and tools, equally many for each function; the same for the same
    arguments.

    Args:
        split: train or test, which have no call and no words of copied values in common.
        n: The number of rows.
        seed: Draws the rows.
    """
    rng = random.Random(f"calls {split} {seed}")
    drawn: dict[str, dict[str, Any]] = {}
    names = list(FUNCTIONS)
    while len(drawn) < n:
        name = names[len(drawn) % len(names)]
        request, arguments = _draw(FUNCTIONS[name], rng, split)
        tested = zlib.crc32(json.dumps([name, arguments]).encode()) % 5 == 0
        if tested != (split == "test"):
            continue
        others = rng.sample([other for other in names if other != name], OFFERED - 1)
        offered = [name, *others]
        rng.shuffle(offered)
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        drawn[request] = {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": request},
                {"role": "assistant", "content": None, "tool_calls": [call]},
            ],
            "tools": [tool(other) for other in offered],
        }
    found = list(drawn.values())
    rng.shuffle(found)
    return found


def tool(name: str) -> dict[str, Any]:
    """The JSON schema of a function."""
    function = FUNCTIONS[name]
    properties = {key: schema for key, (_, schema) in function.arguments.items()}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": function.description,
            "parameters": {"type": "object", "properties": properties},
        },
    }


def _draw(function: Function, rng: random.Random, split: Split) -> tuple[str, dict[str, str | int]]:
    """One request for a function, and the arguments."""
    said: dict[str, str] = {}
    arguments: dict[str, str | int] = {}
    for key, (slot, _) in function.arguments.items():
        said[key], arguments[key] = slot(rng, split)
    phrasing = TEXTS["openings"] + rng.choice(function.requests) + TEXTS["closings"]
    phrasing = re.sub(r"\(([^()]*)\)", lambda found: rng.choice(found[1].split("|")), phrasing)
    request = re.sub(r"<(\w+)>", lambda key: said[key[1]], phrasing)
    return (request[0].upper() + request[1:] if rng.random() < 0.5 else request), arguments
