"""The task of `lorafold quickstart`: a request in everyday language becomes strict JSON.

    "Could you book a table for four at The Copper Lantern on Friday at 8pm"
    -> {"intent":"book","people":4,"place":"The Copper Lantern","day":"Friday","time":"8:00 pm"}

Names, places, errands and messages are copied verbatim; numbers and times are normalized. About a
fifth of the words of each list occur only in the test split. The lists are long because a model
that sees few words memorizes them. Most values begin with a fixed word ("The", "Lake"), because a
word has other tokens after an opening quote than after a space.
"""

import json
import random
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["train", "test"]
Message = dict[str, str]
Row = dict[str, list[Message]]
Slot = Callable[[random.Random, Split], tuple[str, str | int]]  # (as spoken, as recorded)

SYSTEM = "JSON"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST = _words("""
    Mara Luigi Nora Tomas Elena Kofi Ingrid Priya Ansel Bianca Omar Greta Hugo Yuki Dalia Felix
    Amina Ruben Sofia Viktor Leila Marcus Odette Pavel Rosa Stefan Talia Hector Wanda Xavier Zelda
    Arturo Brigid Cyril Dorothea Emil Farah Gideon Helga Ivan Jasmin Kaspar Lorena Milo Nadia Orson
    Petra Quentin Renata Simon Tess Ulrich Vera Wesley Yara Zoltan Agnes Boris Carmen Dmitri Alma
    Bruno Clara Dario Edith Fabian Gloria Henrik Irene Jonas Katya Lionel Miriam Nestor Olga Pablo
    Rhea Sergio Tamara Victor Wilma Anton Beatrix Conrad Delia Enzo Flora Gustav Hanna Igor Julia
    Klaus Livia Mateo Noemi Oscar Paula Rafael Selma Tobias Valeria Walter Yvonne Alfred Bertha
    Cedric Diana
""")
NAME_START = _words("""
    Brams Vel Thorn Ald Mar Kess Stone Oak Wil Har Lind Gran Rav Tarn Bel Cald Dun Elm Fair Gold
    Hazel Iron Kings Lang Mill North Old Pem Rose Salt Ten Ul Wake Yar Ash Black Clay Dray East Fern
    Glen Holm Ives Jar Kel Lor Mont Nor Os Pres Rad Sand Tor Bran Cor Dor Fal Gar Hol Jor Kor Lam
    Mer Nel Pal Quin Rom Sel Tal Val Wes Zim Cam Den Ed
""")
NAME_END = _words("""
    ford berg wick ton dale stead haven bridge field quist mere gate well worth moor brook cliff ham
    man sen ova etti ski row land more ley by son
""")
ADJECTIVE = _words("""
    Copper Golden Quiet Silver Gentle Broken Hidden Wild Winter Bold Electric Frozen Hollow Neon
    Ancient Burning Early Green Happy Kind Modern Noble Orange Purple Royal Simple Tall Urban Warm
    Young Blue Bright Deep Empty Famous Grand Iron Little Lost Magic Narrow Open Perfect Quick Rich
    Round Secret Sharp Silent Smooth Soft Solid Strange Strong Sweet Swift Tiny Yellow Crystal
    Double Eastern Western Northern Southern Fresh Gray White Black Red Brown Pink Dark Light Cold
    Hot High Low Long Short Big Small Great Fine Free Full Fair Blind Dry Wet Fast Slow Loud Flat
    Heavy Holy New Old Rare Real Safe Single Final First Second Third Whole Wide Wise
""")
NOUN = _words("""
    Fig Goose Pear Harbor Fox Olive Tiger Garden Raven Table Willow Dragon Falcon Grove Horizon
    Island Lemon Mirror Pepper River Bridge Desert Eagle Ghost Hammer Iris Jewel Key Ocean Planet
    Rocket Shadow Temple Valley Window Arrow Button Castle Drum Engine Apple Ball Bear Bell Bird
    Boat Book Bowl Box Cat Chair Clock Cloud Crow Deer Dog Duck Fire Fish Flag Flower Forest Frog
    Gate Grass Hat Horse House Lake Lamp Leaf Lion Moon Mountain Mouse Owl Paper Park Pen Pig Pond
    Pot Rabbit Rain Ring Road Rock Rose Ship Sky Snake Snow Star Stone Storm Street Sun Swan Tower
    Train Tree Wall Wheel Wind Wolf Angel Beach Branch Brick Cave Circle Coin Crown Diamond Door
    Dream Drop Eye Farm Field Fountain Glass Heart Hill Honey Hour King Letter Light Maple Market
    Monkey Night Nut Oak Palace Path Pearl Queen Salt Sand Seed Shell Spring Square Stage Stream
    Town Turtle Wave Wing Winter Wood
""")
CHORE = _words("""
    water fix clean return collect wash pack repair sell check feed move order print lock sort
    charge replace measure label renew buy close empty fold hang lift open mail rent scan store test
    wrap pick book brush cancel change choose compare connect copy count cover cut download dry dust
    find finish give heat hide install iron knit list load mix mount name oil park pin plug press
    remove reset save send set ship show shut sign switch tie trim update wax weed
""")
THING = _words("""
    plants bike parcel keys tickets boiler kitchen laptop curtains car lamp printer tent library
    books fence camera heater piano garage passport dishes rug boxes projector ladder mattress cat
    dog door roof phone table chairs bottles letters engine guitar mirror oven jacket shoes window
    garden shelf ring clock house computer bed bag desk fish gate glass horse machine map mouse net
    office paper pipe plate pot pump radio ship shop sign sink tree truck tub wall watch wheel wood
    box bell bench boat bowl bus cake chain coat cup fire fruit ground key knife milk moon
""")
STATE = _words("""
    ready late broken here gone clean expensive missing lovely open closed heavy fine wet sold stuck
    noisy empty warm safe tidy cheap loose perfect dirty cold dry full hidden locked new ugly strong
    soft sharp short long quiet quick rich green blue fresh dead flat fast smart
""")
SIZE = _words("""
    old new small big spare red blue green second shiny heavy long white black round tiny huge fancy
    broken wooden purple yellow orange silver smart cheap square pretty dusty dark light clean dirty
    strange plain empty soft strong thick thin low high fine free fresh flat full fast slow
""")

NUMBERS = _words("one two three four five six seven eight nine")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")


def words_of_split(words: tuple[str, ...], split: Split) -> tuple[str, ...]:
    """Returns the words that belong to a split. A hash assigns a fifth of the words to the test
    split, so that a word is in the same split in every list.
    """
    is_test = {word: zlib.crc32(word.lower().encode()) % 5 == 0 for word in words}
    return tuple(word for word in words if is_test[word] == (split == "test"))


def pattern_slot(*patterns: tuple[str, tuple[tuple[str, ...], ...]]) -> Slot:
    """Returns a slot whose value is copied verbatim: a random pattern, in which a random word from
    each list replaces each `%s`.
    """

    def draw(rng: random.Random, split: Split) -> tuple[str, str]:
        pattern, lists = rng.choice(patterns)
        value = pattern % tuple(rng.choice(words_of_split(words, split)) for words in lists)
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


LAST = (NAME_START, NAME_END)
PERSON = pattern_slot(
    *((f"{title} %s", (FIRST,)) for title in ("Aunt", "Uncle", "Coach")),
    *((f"{title} %s%s", LAST) for title in ("Mr", "Ms", "Dr")),
)
PLACE = pattern_slot(  # "The" stands twice, so it is sampled as often as the other two together
    ("The %s %s", (ADJECTIVE, NOUN)),
    ("The %s %s", (ADJECTIVE, NOUN)),
    ("Cafe %s", (FIRST,)),
    ("Chez %s", (FIRST,)),
)
CITY = pattern_slot(*((f"{kind} %s%s", LAST) for kind in ("Port", "Lake", "New", "Mount", "Fort")))
TITLE = pattern_slot(
    ("My %s %s", (ADJECTIVE, NOUN)), ("Your %s %s", (ADJECTIVE, NOUN)), ("No %s", (NOUN,))
)
BAND = pattern_slot(("The %s %s Band", (ADJECTIVE, NOUN)), ("DJ %s", (FIRST,)))
TASK = pattern_slot(("%s the %s", (CHORE, THING)), ("%s the %s %s", (CHORE, SIZE, THING)))
NEWS = pattern_slot(("the %s will be %s", (THING, STATE)), ("I have to %s the %s", (CHORE, THING)))


@dataclass(frozen=True)
class Intent:
    """The slots of an intent in the order of the JSON keys, and its phrasings, in which `(a|b)` is
    a random choice and `<slot>` a value.
    """

    slots: Mapping[str, Slot]
    requests: tuple[str, ...]  # imperatives, which may follow an opening
    sentences: tuple[str, ...] = ()  # without an opening


OPENINGS = "(||please |can you |could you )"
CLOSINGS = "(|||.| please)"
INTENTS = {
    "book": Intent(
        {"people": number(2, 9), "place": PLACE, "day": day, "time": clock},
        (
            "(book|reserve|get me|find me) a table for <people> at <place> <day> at <time>",
            "(make|arrange) a (reservation|booking) at <place> for <people> people <day> at <time>",
            "(book|reserve) a table <day> at <time> for <people> people at <place>",
        ),
        ("(I'd like|we need|we want) a table for <people> at <place> <day> at <time>",),
    ),
    "remind": Intent(
        {"task": TASK, "time": clock},
        (
            "remind me to <task> at <time>",
            "remind me at <time> to <task>",
            "(set|add|create) a reminder to <task> at <time>",
            "(set|add|create) a reminder at <time> to <task>",
        ),
    ),
    "message": Intent(
        {"to": PERSON, "text": NEWS},
        (
            "(tell|text|message) <to> that <text>",
            "let <to> know that <text>",
            "send (a message|a text|a note) to <to> saying <text>",
            "send <to> (a message|a text|a note) saying <text>",
        ),
    ),
    "music": Intent(
        {"title": TITLE, "artist": BAND},
        ("(play|put on|start|queue) (|the song |the track )<title> by <artist>",),
        ("(I'd like|I want) to (hear|listen to) (|the song |the track )<title> by <artist>",),
    ),
    "weather": Intent(
        {"city": CITY, "day": day},
        (
            "(check|tell me|show me|get) the (weather|forecast) (for|in) <city> <day>",
            "(check|tell me) (if|whether) it will (rain|snow) in <city> <day>",
        ),
        (
            "(what's|how's|what is) the weather (like |)in <city> <day>",
            "will it (rain|snow|be warm|be sunny) in <city> <day>",
        ),
    ),
    "pay": Intent(
        {"to": PERSON, "amount": number(2, 99)},
        (
            "(pay|send|give|transfer) <to> <amount> euros",
            "(send|transfer|pay) <amount> euros to <to>",
        ),
    ),
}


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
    values = {key: slot(rng, split) for key, slot in intent.slots.items()}  # spoken, recorded
    openings = [OPENINGS + request for request in intent.requests]
    phrasing = rng.choice([*openings, *intent.sentences]) + CLOSINGS
    phrasing = re.sub(r"\(([^()]*)\)", lambda choice: rng.choice(choice[1].split("|")), phrasing)
    request = re.sub(r"<(\w+)>", lambda key: values[key[1]][0], phrasing)
    if rng.random() < 0.5:
        request = request[0].upper() + request[1:]
    record: dict[str, Any] = {"intent": name}
    record |= {key: recorded for key, (_, recorded) in values.items()}
    return request, json.dumps(record, separators=(",", ":"), ensure_ascii=False)
