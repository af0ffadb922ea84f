"""What there is to say of rows that are good: which keys are ignored, also inside messages, which
roles are read as others, and how many turns are not trained on, as the rows say themselves.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from lorafold.data.foreign import SPOKEN
from lorafold.data.messages import KEYS, asks, role_of
from lorafold.data.parsing import Row
from lorafold.data.shapes import PROMPTS, Shape
from lorafold.data.sharegpt import TURN_KEYS

PLAIN = {"system", "user", "assistant", "tool", "developer"}
SHOWN = 5  # roles that one line names
# what databases, spreadsheets and pandas write where there is nothing, or a wrong formula
NOTHING = {
    *("NULL", "null", "None", "NaN", "nan", "\\N"),
    *("#N/A", "#REF!", "#VALUE!", "#NAME?", "#DIV/0!"),
}
LONGEST = max(map(len, NOTHING))
AS_WORD = "which is read as that word and not as an empty cell"
BLANK = "rows are blank and are left out"
UNANSWERED = "rows have an empty answer and are left out (weight: 1 in its message keeps one)"
LEFT = "assistant turns are not trained on, as their rows say"
OTHERS = "turns that rows want trained are not of the assistant, and are not trained on"
AS_THEY_ARE = "messages go to the chat template with roles of their own, and are not trained on"


class Noticed:
    """Gathers what there is to say, row by row."""

    def __init__(self, wanted: str = "") -> None:
        self._answers = wanted != PROMPTS  # are needed
        self._first: dict[str, str] = {}
        self._ignored: dict[str, None] = {}
        self._counts: Counter[str] = Counter()
        self._roles: dict[str, Counter[str]] = {}  # by what becomes of them

    def blank(self, row: Any, place: str) -> bool:
        """Whether a row has nothing in any of its fields, as spreadsheets have them."""
        values = row.values() if isinstance(row, dict) else [row]
        filled = (x.strip() if isinstance(x, str) else x is not None for x in values)
        return not any(filled) and self._left_out(BLANK, place)

    def add(self, shape: Shape, row: Row, place: str) -> bool:
        """Look at one more row. Returns whether it is to be used.

        Args:
            place: Where it is, for messages.
        """
        if self._answers and not shape.answered(row):
            return not self._left_out(UNANSWERED, place)
        for key, value in row.items():
            if value is None:
                continue
            if key not in shape.known:
                self._ignored[key] = None
            elif isinstance(value, str):
                if len(value) <= LONGEST and value in NOTHING and key != "label":
                    self._counts[f"texts of {key} are {value!r} alone, {AS_WORD}"] += 1
            elif key in SPOKEN and isinstance(value, list):
                for message in value:
                    self._look(f"{key}[]", message)
            elif key in SPOKEN and isinstance(value, dict):
                self._look(key, value)
        if shape.remark and (remark := shape.remark(row)):
            self._counts[remark] += 1
        return True

    @property
    def ignored(self) -> tuple[str, ...]:
        """The keys that are no part of shapes, as they appear; messages[].id for one inside."""
        return tuple(self._ignored)

    @property
    def told(self) -> tuple[str, ...]:
        """What else there is to say, in one line each."""
        return tuple(self._lines())

    def _left_out(self, why: str, place: str) -> bool:
        self._counts[why] += 1
        self._first.setdefault(why, f"; the first: {place}")
        return True

    def _look(self, field: str, message: dict[str, Any]) -> None:
        turn = "from" in message
        role = message["from" if turn else "role"]
        content = message.get("content")
        if role in PLAIN and len(message) == 2 and not isinstance(content, list):
            return
        known = TURN_KEYS if turn else KEYS
        for key, value in message.items():
            if key not in known and value is not None:
                self._ignored[f"{field}.{key}"] = None
        for part in content if isinstance(content, list) else ():
            for key in sorted(part.keys() - {"type", "text"}):
                if part[key] is not None:
                    self._ignored[f"{field}.content[].{key}"] = None
        meant, asked = role_of(role), asks(message)
        if meant == "assistant" and asked is False:
            self._counts[LEFT] += 1
        elif meant != "assistant" and asked:
            self._counts[OTHERS] += 1
        if not turn and role not in PLAIN:
            what = f"messages are read as those of {meant}" if meant in PLAIN else AS_THEY_ARE
            self._roles.setdefault(what, Counter())[role] += 1

    def _lines(self) -> Iterator[str]:
        for what, count in self._counts.items():
            yield f"{count:,} {what}{self._first.get(what, '')}"
        for what, roles in self._roles.items():
            named = ", ".join(map(repr, list(roles)[:SHOWN]))
            more = f" and {len(roles) - SHOWN} more" if len(roles) > SHOWN else ""
            yield f"{roles.total():,} {what}: {named}{more}"
