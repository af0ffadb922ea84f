"""Three functions that an agent may call, and conversations in which they are called: what the
embedded model is taught in `test_serving_agent.py`.

    rows("train", 80, seed=0)       four exchanges each: a question, a call, its result, the answer

Cities and places of the test split occur in no row of the train split, and a result is as random
as a random number, so that an answer has it from the call alone.
"""

from __future__ import annotations

import random
import re
import zlib
from typing import Any

from lorafold.quickstart.task import SLOTS, Split, number

CURRENCIES = ("dollars", "pounds", "yen", "francs", "rupees")
EACH = 4  # exchanges in a row, since the tools are most of its tokens
SKIES = ("sunny", "cloudy", "foggy", "rainy", "windy", "snowy")
SMALL_TALK = (
    ("(Thank you|Thanks|Thanks a lot)(|!|.)", "You are welcome."),
    ("(Hello|Hi|Good morning)(|!|.)", "Hello! What can I do for you?"),
)
ASKED = {
    "get_weather": (
        "(What|How) is the weather in <city>?", "(Tell me|Check) the weather in <city>",
        "(Is it warm|Is it cold|Does it rain) in <city>?",
    ),
    "convert_euros": (
        "(How much is|How much are|What are) <amount> euros in <currency>?",
        "(Convert|Change) <amount> euros (to|into) <currency>",
    ),
    "book_table": (
        "(Book|Reserve|I need|Get me) a table for <people> at <place>",
        "(Can you reserve|Please book) <place> for <people> people?",
    ),
}  # fmt: skip
BOTH = ("What is the weather in <a> and in <b>?", "Compare the weather in <a> and <b>")
_people, _amount = number(2, 9), number(10, 999)


def get_weather(city: str) -> str:
    """Get the weather of a city."""
    drawn = zlib.crc32(city.encode())
    return f"{drawn % 38} degrees and {SKIES[drawn % len(SKIES)]}"


def convert_euros(amount: int, currency: str) -> str:
    """Convert euros."""
    return f"{amount * (3 + zlib.crc32(currency.encode()) % 50)} {currency}"


def book_table(place: str, people: int) -> str:
    """Book a table."""
    return f"booked as number {1000 + zlib.crc32(f'{place} {people}'.encode()) % 9000}"


FUNCTIONS = {f.__name__: f for f in (get_weather, convert_euros, book_table)}
SAYS = {
    "get_weather": "It is {result} in {city}.",
    "convert_euros": "{amount} euros are {result}.",
    "book_table": "Your table for {people} at {place} is {result}.",
}


def _tool(name: str, **types: str) -> dict[str, Any]:
    """A function as pydantic-ai describes it."""
    properties = {key: {"type": type} for key, type in types.items()}
    parameters = {
        "additionalProperties": False, "properties": properties, "required": list(types),
        "type": "object",
    }  # fmt: skip
    function = {
        "name": name, "description": FUNCTIONS[name].__doc__, "parameters": parameters,
        "strict": True,
    }  # fmt: skip
    return {"type": "function", "function": function}


TOOLS = [
    _tool("get_weather", city="string"),
    _tool("convert_euros", amount="integer", currency="string"),
    _tool("book_table", place="string", people="integer"),
]


def rows(split: Split, n: int, seed: int) -> list[dict[str, Any]]:
    """Conversations with tools; the same for the same arguments."""
    rng = random.Random(f"agent {split} {seed}")
    found = []
    for _ in range(n):
        tools = rng.sample(TOOLS, 3 if rng.random() < 0.6 else 2)
        system = [{"role": "system", "content": "Be brief."}] if rng.random() < 0.5 else []
        names = [tool["function"]["name"] for tool in tools]
        messages = [m for _ in range(EACH) for m in _exchange(rng, split, names)]
        found.append({"messages": [*system, *messages], "tools": tools})
    return found


def question(rng: random.Random, split: Split, name: str) -> tuple[str, dict[str, Any]]:
    """A question that needs a function, and the arguments."""
    spoken: dict[str, str] = {}
    arguments: dict[str, Any] = {}
    for key in TOOLS[list(FUNCTIONS).index(name)]["function"]["parameters"]["required"]:
        if key == "currency":
            spoken[key] = arguments[key] = rng.choice(CURRENCIES)
            continue
        slot = (SLOTS | {"people": _people, "amount": _amount})[key]
        spoken[key], arguments[key] = slot(rng, split)
    return _said(rng, rng.choice(ASKED[name]), spoken), arguments


def _exchange(rng: random.Random, split: Split, names: list[str]) -> list[dict[str, Any]]:
    drawn = rng.random()
    if drawn < 0.1:
        asked, answer = rng.choice(SMALL_TALK)
        return [_user(_said(rng, asked, {})), {"role": "assistant", "content": answer}]
    if drawn < 0.2 and "get_weather" in names:
        cities = [str(SLOTS["city"](rng, split)[1]) for _ in range(2)]
        asked = _said(rng, rng.choice(BOTH), dict(zip("ab", cities, strict=True)))
        calls = [("get_weather", {"city": city}) for city in cities]
    else:
        name = rng.choice(names)
        asked, arguments = question(rng, split, name)
        calls = [(name, arguments)]
    results = [_result(rng, name, arguments) for name, arguments in calls]
    said = [
        SAYS[name].format(result=result, **arguments)
        for (name, arguments), result in zip(calls, results, strict=True)
    ]
    return [
        _user(asked),
        {"role": "assistant", "content": None, "tool_calls": [
            {"type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in calls
        ]},
        *({"role": "tool", "name": name, "content": result}
          for (name, _), result in zip(calls, results, strict=True)),
        {"role": "assistant", "content": " ".join(said)},
    ]  # fmt: skip


def _result(rng: random.Random, name: str, arguments: dict[str, Any]) -> str:
    if name == "get_weather":
        return f"{rng.randint(0, 37)} degrees and {rng.choice(SKIES)}"
    if name == "convert_euros":
        return f"{rng.randint(10, 60_000)} {arguments['currency']}"
    return f"booked as number {rng.randint(1000, 9999)}"


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _said(rng: random.Random, pattern: str, spoken: dict[str, str]) -> str:
    text = re.sub(r"\(([^()]*)\)", lambda found: rng.choice(found[1].split("|")), pattern)
    return re.sub(r"<(\w+)>", lambda key: spoken[key[1]], text)
