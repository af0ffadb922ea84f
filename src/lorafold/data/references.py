"""What generation is measured against: of each row the prompt of its last assistant turn, and the
turn as the reference.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from lorafold.data.control_tokens import as_text, ids_of
from lorafold.data.conversations import Conversation
from lorafold.data.omissions import check_able, check_shown
from lorafold.data.reasoning import block_of
from lorafold.data.trained_spans import Drawing
from lorafold.errors import LorafoldError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase



class Reference(NamedTuple):
    """The content of the message before a turn, the rendered prompt and the turn's own text."""

    asked: str
    prompt: str
    text: str


def references(
    conversations: Iterable[Conversation], tokenizer: "PreTrainedTokenizerBase"
) -> list[Reference]:
    """The prompt and the reference of each conversation, which is a row of its own.

    The reference of a conversation is its last assistant turn, but for those that its row leaves
    out of training: the content or, where the turn has
    calls, the text that the template renders for it, without special tokens and reasoning. The
    prompt has the row's tools, and the template's special tokens: tokenize it with
    add_special_tokens=False. Raises LorafoldError for plain text, for conversations without
    an assistant turn after a prompt, and for those that the template does not show whole.
    """
    found: list[Reference] = []
    bad: list[str] = []
    for number, given in enumerate(conversations, 1):
        turns = replace(given, trained=0).turns
        if not turns or not turns[-1]:
            what = "no assistant turn after a prompt" if given.messages else "plain text"
            bad.append(f"row {number}: found {what}")
            continue
        try:
            found.append(reference_of(given, turns[-1], tokenizer))
        except LorafoldError as error:
            raise LorafoldError(f"data: row {number}: {error}") from error
    if bad:
        raise LorafoldError(
            "data: evaluation by generation needs rows with a prompt and a reference completion:"
            f" {listed(bad, '; ')}"
        )
    return found


def without_reasoning(text: str, prompt: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """A completion without the block of reasoning that it begins with, if it has one.

    Args:
        prompt: The prompt that it completes, which may open the block.
        tokenizer: Its chat template says how reasoning is enclosed.
    """
    if tokenizer.chat_template is None:
        return text
    return text[block_of(tokenizer).end(text, prompt) :]


def reference_of(
    conversation: Conversation, last: int, tokenizer: "PreTrainedTokenizerBase"
) -> Reference:
    """The prompt of one assistant turn, and the turn.

    Args:
        last: The turn's index, from 1.
        tokenizer: With the chat template.

    Raises LorafoldError for what the template refuses or does not show whole.
    """
    messages = conversation.messages[: last + 1]
    check_able(conversation, tokenizer)
    given = as_text(Conversation(messages, 0, conversation.tools), tokenizer)
    drawing = Drawing(given, tokenizer)
    prompt, message = drawing.prompt(last), messages[last]
    asked = messages[last - 1].get("content", "")
    if not message.get("tool_calls"):
        check_shown(replace(given, messages=given.messages[:last]), prompt, tokenizer)
        return Reference(asked, prompt, message.get("content", ""))
    turn = drawing.turn(last)
    if turn is None:
        raise LorafoldError(
            f"messages[{last}]: the chat template renders this turn differently at generation"
        )
    check_shown(given, turn.text, tokenizer)
    said = without_reasoning(turn.text[turn.start : turn.end], prompt, tokenizer)
    ids = ids_of(said, tokenizer)
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Reference(asked, prompt, str(text))
