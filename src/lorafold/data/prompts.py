"""Prompts, of rows that need not have a completion.

    {"prompt": text or messages}        or a row of any shape that is a conversation

The prompt of a conversation is all that comes before its last assistant turn, if it ends with one;
that turn is then the reference. Use it where a model is asked and not trained.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lorafold.data.checking import checked, renamed
from lorafold.data.conversations import Conversation
from lorafold.data.references import reference_of
from lorafold.data.render import prompt_of
from lorafold.data.shapes import CONVERSATIONS, PROMPT_ALONE, PROMPTS, SHAPES, shape_of
from lorafold.data.sources import Row
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Prompt(NamedTuple):
    """A prompt as the chat template renders it for generation, and the completion that its row has,
    or None.
    """

    text: str
    reference: str | None


ASKING = tuple(shape for shape in (*SHAPES, PROMPT_ALONE) if PROMPTS in shape.gives)


def _asked(row: Row) -> Conversation:
    """The conversation of a row; one without messages where it asks nothing."""
    shape = shape_of(row, ASKING)
    if shape is None:
        return Conversation([])
    read = shape.gives.get(CONVERSATIONS, shape.gives[PROMPTS])
    found: Conversation = read(row)
    return found


def read_prompts(
    numbered: Iterable[tuple[int, Row | str]], columns: Mapping[str, str], source: str
) -> list[Row]:
    """The rows, once they are known to be prompts of one shape.

    Args:
        numbered: (number, row) pairs, as a source gives them.
        columns: The names that keys have in the rows, by those that lorafold knows.
        source: The name of the rows in messages.

    Raises LorafoldError for bad rows, and if there is none.
    """
    return [row for *_, row in checked(renamed(numbered, columns), source, shapes=ASKING)]


def asked_in(row: Row) -> list[str]:
    """What a row asks before each turn of the assistant, or at its end, each as a text to compare
    rows of any shapes by; none for rows of plain text. Case and outer space do not count.
    """
    messages = _asked(row).messages
    if not messages:
        return []
    said = [json.dumps([m["role"], str(m.get("content", "")).strip().casefold()]) for m in messages]
    ends = [n for n, message in enumerate(messages) if n and message["role"] == "assistant"]
    if messages[-1]["role"] != "assistant":
        ends.append(len(messages))
    return ["\n".join(said[:n]) for n in ends]


def prompts_of(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", name: str
) -> list[Prompt]:
    """The rendered prompts of rows that `read_prompts` checked.

    Args:
        tokenizer: With the chat template.
        name: What messages call the rows.

    Raises LorafoldError for a prompt that the template refuses or does not show whole.
    """
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(_prompt(row, tokenizer))
        except LorafoldError as error:
            raise LorafoldError(f"{name}: row {number}: {error}") from error
    return found


def _prompt(row: Row, tokenizer: "PreTrainedTokenizerBase") -> Prompt:
    given = _asked(row)
    last = len(given.messages) - 1
    if given.messages[last]["role"] == "assistant":
        if not last:
            raise LorafoldError("found no message before the assistant's turn, expected a prompt")
        reference = reference_of(given, last, tokenizer)
        return Prompt(reference.prompt, reference.text)
    return Prompt(prompt_of(given, tokenizer), None)
