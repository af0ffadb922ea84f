"""The task of `lorafold quickstart`: a request in free words becomes strict JSON.

    "Could you book a table for four at The Copper Lantern on Friday at 8pm"
    -> {"intent":"book_table","people":4,"place":"The Copper Lantern","day":"friday","time":"20:00"}

Names, places, dishes and messages are copied as they stand; numbers, days and times are normalised (four -> 4, Friday -> friday,
half past seven in the evening -> 19:30). Keys come in a fixed order, without spaces. A small model scores 0% before training, so
what it does afterwards it has learned from these rows alone.

Every word list below is cut in two: about every fifth word goes to the test split, the others to the train split. A test value is
made of held-out words only, so none of its names, places, dishes or messages occurs in training, neither whole nor in parts. The lists
are long on purpose: a model that has seen few words learns the words, one that has seen many learns to copy.
Pure Python, no network, the same rows for the same arguments.
"""

import json
import random
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]
Message = dict[str, str]
Row = dict[str, list[Message]]
Slot = Callable[[random.Random, Split], tuple[str, str | int]]  # (as spoken, as recorded)

SYSTEM = "JSON"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST = _words("""
    Mara Luigi Nora Tomas Elena Kofi Ingrid Priya Ansel Bianca Omar Greta Hugo Yuki Dalia Felix Amina Ruben Sofia Viktor Leila Marcus
    Odette Pavel Rosa Stefan Talia Hector Wanda Xavier Zelda Arturo Brigid Cyril Dorothea Emil Farah Gideon Helga Ivan Jasmin Kaspar
    Lorena Milo Nadia Orson Petra Quentin Renata Simon Tess Ulrich Vera Wesley Yara Zoltan Agnes Boris Carmen Dmitri Alma Bruno Clara
    Dario Edith Fabian Gloria Henrik Irene Jonas Katya Lionel Miriam Nestor Olga Pablo Rhea Sergio Tamara Victor Wilma Anton Beatrix
    Conrad Delia Enzo Flora Gustav Hanna Igor Julia Klaus Livia Mateo Noemi Oscar Paula Rafael Selma Tobias Valeria Walter Yvonne Alfred
    Bertha Cedric Diana
""")
NAME_START = _words("""
    Brams Vel Thorn Ald Mar Kess Stone Oak Wil Har Lind Gran Rav Tarn Bel Cald Dun Elm Fair Gold Hazel Iron Kings Lang Mill North Old
    Pem Rose Salt Ten Ul Wake Yar Ash Black Clay Dray East Fern Glen Holm Ives Jar Kel Lor Mont Nor Os Pres Rad Sand Tor Bran Cor Dor
    Fal Gar Hol Jor Kor Lam Mer Nel Pal Quin Rom Sel Tal Val Wes Zim Cam Den Ed
""")
NAME_END = _words("""
    ford berg wick ton dale stead haven bridge field quist mere gate well worth moor brook cliff ham man sen ova etti ski row land more
    ley by son
""")
ADJECTIVE = _words("""
    Copper Golden Hungry Quiet Crooked Laughing Velvet Wandering Rusty Silver Lucky Salty Gentle Midnight Painted Broken Hidden Jolly
    Marble Scarlet Sleepy Smoky Thirsty Wild Winter Amber Bold Cheerful Dusty Electric Frozen Hollow Ivory Lonely Neon Ancient Burning
    Clever Distant Early Faded Green Happy Icy Jagged Kind Lazy Modern Noble Orange Purple Royal Simple Tall Urban Violet Warm Young
    Blue Crimson
""")
NOUN = _words("""
    Lantern Fig Goose Anchor Kettle Pear Harbor Fox Spoon Olive Tiger Barrel Garden Raven Table Oyster Willow Compass Dragon Ember
    Falcon Grove Horizon Island Juniper Kite Lemon Mirror Nettle Orchid Pepper Quarry River Saddle Thistle Bridge Candle Desert Eagle
    Feather Ghost Hammer Iris Jewel Key Ladder Meadow Needle Ocean Planet Rocket Shadow Temple Valley Window Arrow Button Castle Drum
    Engine
""")
STYLE = _words("""
    spicy smoked grilled crispy creamy roasted pickled stuffed braised steamed fried baked glazed peppery toasted buttered chilled
    marinated crunchy sweet sour salted herbed charred cold hot tender juicy golden fresh mild rich light dark sticky seared wild plain
    zesty double tangy salty buttery nutty garlicky lemony vegan organic homemade classic rustic hearty chunky silky flaky fluffy thick
    thin large half local frozen whole extra simple chopped sliced mashed grated whipped candied honeyed poached boiled minced shredded
    blackened breaded curried cheesy
""")
MAIN = _words("""
    mushroom lentil chicken pumpkin salmon tofu spinach beef potato shrimp eggplant pork cauliflower duck chickpea tomato turkey bean
    lamb carrot zucchini cheese trout cabbage leek rice onion garlic corn egg apple lemon coconut peanut barley crab tuna bacon walnut
    ginger quinoa lobster squid sausage ham pepper celery radish pear mango pineapple almond hazelnut avocado beetroot asparagus
    artichoke pea couscous millet oyster mussel venison rabbit
""")
DISH = _words("""
    risotto curry soup salad pie burger dumplings stew lasagna noodles tacos wrap gratin skewers sandwich pasta bowl roll omelette toast
""")
CHORE = _words("""
    water fix clean return collect paint wash pack repair sell check feed move order print lock sort charge replace polish measure
    unload label renew sharpen buy close deliver empty fold hang lift open mail rent scan store test wrap weigh pick bring bake borrow
    book boil brush cancel carry change choose compare connect copy count cover cut decorate donate download dry dust examine find
    finish give grease heat hide inspect install iron knit lend list load mend mix mount name oil park photograph pin plug pour press
    recycle remove reset rinse save scrub seal send serve set ship show shut sign sketch sweep switch tie trim update vacuum wax weed
""")
THING = _words("""
    plants bike parcel keys tickets boiler kitchen laptop curtains car suitcase lamp printer tent library books fence camera heater
    invoices bookshelf piano garage passport dishes rug boxes projector ladder mattress cat dog door roof phone table chairs bottles
    letters engine guitar mirror oven jacket shoes window garden shelf ring clock
""")
STATE = _words("""
    ready late broken here gone clean expensive missing lovely open closed heavy fine wet sold stuck noisy empty warm safe tidy cheap
    loose perfect dirty cold dry full hidden locked new
""")
SIZE = _words("""
    old new small big spare red blue green second shiny heavy long white black round tiny huge fancy broken wooden purple yellow orange
    silver smart cheap square pretty dusty
""")

NUMBERS = _words("one two three four five six seven eight nine ten eleven twelve")
DAYS = _words("monday tuesday wednesday thursday friday saturday sunday")


def part(words: tuple[str, ...], split: Split) -> tuple[str, ...]:
    """The words of a list that belong to a split: about every fifth to test; a word of several lists is on the same side in all."""
    return tuple(word for word in words if (zlib.crc32(word.lower().encode()) % 5 == 0) == (split == "test"))


def composed(*patterns: tuple[str, tuple[tuple[str, ...], ...]]) -> Slot:
    """A slot copied verbatim: one of the patterns, its `%s` filled from the split's part of each word list."""

    def draw(rng: random.Random, split: Split) -> tuple[str, str]:
        pattern, lists = rng.choice(patterns)
        value = pattern % tuple(rng.choice(part(words, split)) for words in lists)
        return value, value

    return draw


def number(low: int, high: int) -> Slot:
    """An integer, in digits or (up to twelve) in words."""

    def draw(rng: random.Random, split: Split) -> tuple[str, int]:
        value = rng.randint(low, high)
        spoken = NUMBERS[value - 1] if value <= len(NUMBERS) and rng.random() < 0.6 else str(value)
        return spoken, value

    return draw


def day(rng: random.Random, split: Split) -> tuple[str, str]:
    """A weekday, today or tomorrow, with its preposition."""
    value = rng.choice([*DAYS, "today", "tomorrow"])
    return (f"on {value.capitalize()}" if value in DAYS else value), value


def clock(*hours: int) -> Slot:
    """A time as "8pm", "8:30pm", "eight in the evening" or "half past eight in the evening" -> "20:30"."""

    def draw(rng: random.Random, split: Split) -> tuple[str, str]:
        hour, half = rng.choice(hours), rng.random() < 0.4
        if rng.random() < 0.3:
            period = "morning" if hour < 12 else "evening"
            spoken = f"{'half past ' if half else ''}{NUMBERS[hour % 12 - 1]} in the {period}"
        else:
            spoken = f"{hour % 12}{':30' if half else ''}{'am' if hour < 12 else 'pm'}"
        return spoken, f"{hour:02}:{'30' if half else '00'}"

    return draw


MORNING, EVENING = (7, 8, 9, 10), (18, 19, 20, 21)
LAST = (NAME_START, NAME_END)
PERSON = composed(("%s", (FIRST,)), ("%s %s%s", (FIRST, *LAST)), ("%s %s%s", (FIRST, *LAST)))
PLACE = composed(
    ("The %s %s", (ADJECTIVE, NOUN)), ("%s's", (FIRST,)), ("%s%s's Kitchen", LAST), ("Cafe %s%s", LAST), ("%s%s & %s", (*LAST, NOUN))
)
CITY = composed(*((pattern, LAST) for pattern in ("%s%s", "%s%s", "Port %s%s", "Lake %s%s", "%s%s Falls", "%s%s Springs", "%s%s Beach")))
TITLE = composed(("%s %s", (ADJECTIVE, NOUN)), ("%s in the %s", (NOUN, NOUN)), ("My %s %s", (ADJECTIVE, NOUN)))
FOOD = composed(("%s %s %s", (STYLE, MAIN, DISH)), ("%s %s", (MAIN, DISH)))
TASK = composed(("%s the %s", (CHORE, THING)), ("%s the %s %s", (CHORE, SIZE, THING)))
NEWS = composed(("the %s will be %s", (THING, STATE)), ("I have to %s the %s", (CHORE, THING)))


@dataclass(frozen=True)
class Intent:
    """Slots in the order of the JSON keys, and phrasings: `(a|b)` is a choice, `<slot>` the slot as spoken."""

    slots: Mapping[str, Slot]
    requests: tuple[str, ...]  # imperatives, which take an opening
    sentences: tuple[str, ...] = ()  # complete as they are


OPENINGS = "(||please |can you |could you )"
CLOSINGS = "(|||.| please)"
INTENTS = {
    "book_table": Intent(
        {"people": number(2, 12), "place": PLACE, "day": day, "time": clock(*EVENING)},
        (
            "(book|reserve|get me|find me) a table for <people> at <place> <day> at <time>",
            "(make|arrange) a (reservation|booking) at <place> for <people> people <day> at <time>",
            "(book|reserve) a table <day> at <time> for <people> people at <place>",
        ),
        ("(I'd like|we need|we want) a table for <people> at <place> <day> at <time>",),
    ),
    "remind": Intent(
        {"task": TASK, "time": clock(*MORNING, *EVENING)},
        (
            "remind me to <task> at <time>",
            "remind me at <time> to <task>",
            "(set|add|create) a reminder to <task> at <time>",
            "(set|add|create) a reminder at <time> to <task>",
        ),
    ),
    "send_message": Intent(
        {"to": PERSON, "text": NEWS},
        (
            "(tell|text|message) <to> that <text>",
            "let <to> know that <text>",
            "send (a message|a text|a note) to <to> saying <text>",
            "send <to> (a message|a text|a note) saying <text>",
        ),
    ),
    "play_music": Intent(
        {"title": TITLE, "artist": PERSON},
        ("(play|put on|start|queue) (|the song |the track )<title> by <artist>",),
        ("(I'd like|I want) to (hear|listen to) (|the song |the track )<title> by <artist>",),
    ),
    "order_food": Intent(
        {"count": number(2, 9), "item": FOOD, "place": PLACE},
        (
            "(order|get me|get us|buy) <count> (portions|servings|plates) of <item> from <place>",
            "order from <place> <count> (portions|servings|plates) of <item>",
        ),
        ("(I'd like|we want) <count> (portions|servings|plates) of <item> from <place>",),
    ),
    "book_train": Intent(
        {"from": CITY, "to": CITY, "time": clock(*MORNING, *EVENING)},
        (
            "(book|find|get) (me |)a train from <from> to <to> at <time>",
            "(book|buy|get) (me |)a train ticket to <to> from <from> at <time>",
            "get me from <from> to <to> by train at <time>",
        ),
        ("(I need|I want) a train from <from> to <to> at <time>",),
    ),
    "weather": Intent(
        {"city": CITY, "day": day},
        (
            "(check|tell me|show me|get) the (weather|forecast) (for|in) <city> <day>",
            "(check|tell me) (if|whether) it will (rain|snow) in <city> <day>",
        ),
        ("(what's|how's|what is) the weather (like |)in <city> <day>", "will it (rain|snow|be warm|be sunny) in <city> <day>"),
    ),
    "pay": Intent(
        {"to": PERSON, "amount": number(2, 99)},
        ("(pay|send|give|transfer) <to> <amount> euros", "(send|transfer|pay) <amount> euros to <to>"),
    ),
}


def rows(split: Split, n: int, seed: int) -> list[Row]:
    """n different rows {"prompt": [system, user], "completion": [assistant]}, as many of each intent; the same for the same arguments."""
    rng = random.Random(f"{split} {seed}")
    drawn: dict[str, Row] = {}
    names = list(INTENTS)
    while len(drawn) < n:
        request, answer = _draw(names[len(drawn) % len(names)], rng, split)
        drawn[request] = {
            "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": request}],
            "completion": [{"role": "assistant", "content": answer}],
        }
    order = list(drawn.values())
    rng.shuffle(order)
    return order


def _draw(name: str, rng: random.Random, split: Split) -> tuple[str, str]:
    """One request of an intent, and its JSON."""
    intent = INTENTS[name]
    spoken: dict[str, str] = {}
    record: dict[str, str | int] = {"intent": name}
    for key, slot in intent.slots.items():
        words, value = slot(rng, split)
        while value in record.values():  # a train from Oakwick to Oakwick
            words, value = slot(rng, split)
        spoken[key], record[key] = words, value
    phrasing = rng.choice([OPENINGS + request for request in intent.requests] + list(intent.sentences)) + CLOSINGS
    phrasing = re.sub(r"\(([^()]*)\)", lambda choice: rng.choice(choice[1].split("|")), phrasing)
    request = re.sub(r"<(\w+)>", lambda key: spoken[key[1]], phrasing)
    if rng.random() < 0.5:
        request = request[0].upper() + request[1:]
    return request, json.dumps(record, separators=(",", ":"), ensure_ascii=False)
