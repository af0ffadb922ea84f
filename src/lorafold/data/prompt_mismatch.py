"""What generation makes of a turn whose rendering does not begin with its generation prompt.

    prompt  ... <think>\\n                        the generation prompt opens a block of reasoning
    after   ... answer<end>                       that a finished turn is rendered without
    found   ... <think>\\nreasoning\\n</think>\\n\\nanswer<end>

So it is with templates whose prompt opens a block, or supplies an empty one, and with those that
rewrite earlier messages when the turn is there. The text found begins with the prompt, always.
"""

import re

from lorafold.data.reasoning import OPENED

CLOSED = re.compile(r"([<\[])(\w+)([>\]])\s*\1/\2\3\s*\Z")  # an empty block at a prompt's end
SEEN = 24  # characters of the message before the turn by which it is found again


def after_block(prompt: str, after: str, reasoning: str, content: str) -> str | None:
    """The text of a turn whose prompt ends with a block of reasoning: the prompt, then what it
    leaves to the model. None where no such form is found.

    A prompt that opens a block of reasoning is followed by the reasoning, which may be empty, the
    closing and the answer; one that has an empty block is followed by the answer.

    Args:
        prompt: The rendering of the messages before the turn, with the generation prompt.
        after: The rendering up to and including the turn.
        reasoning: The turn's reasoning, or an empty text.
        content: The turn's content, which may begin with a block of reasoning.
    """
    found = CLOSED.search(prompt) or OPENED.search(prompt)
    if found is None:
        return None
    header, tags = prompt[: found.start()], found.groups()
    if not after.startswith(header) or not after[len(header) :].strip():
        return None
    left, name, right = tags
    opening, closing = f"{left}{name}{right}", f"{left}/{name}{right}"
    answer = after[len(header) :]
    if answer.lstrip().startswith(opening) and closing in answer:
        inner, _, answer = answer.partition(closing)
        reasoning = reasoning or inner.lstrip().removeprefix(opening)
    elif closing in content:
        reasoning = reasoning or content.partition(closing)[0].rpartition(opening)[2]
    if CLOSED.search(prompt):
        return prompt + answer.lstrip("\n")
    thought = reasoning.strip("\n")
    return f"{prompt}{thought}\n{closing}\n\n{answer.lstrip()}"


def after_rewriting(prompt: str, after: str, before: str, content: str) -> str | None:
    """The text of a turn at whose arrival the template rewrites earlier messages: the prompt, then
    what follows the same end of a prompt in the rewritten text. None where it is not found.

    Args:
        prompt: The rendering of the messages before the turn, with the generation prompt.
        after: The rendering up to and including the turn.
        before: The rendering of the messages before the turn, without the generation prompt.
    """
    if not prompt.startswith(before) or len(prompt) == len(before):
        return None
    end = prompt[max(0, len(before) - SEEN) :]
    at = after.rfind(end)
    said = after[at + len(end) :]
    return prompt + said if at >= 0 and said.strip() and content.strip() in said else None
