"""What generation makes of a turn whose rendering does not begin with its generation prompt.

    prompt  ... <think>\\n                        the generation prompt opens a block of reasoning
    after   ... answer<end>                       that a finished turn is rendered without
    found   ... <think>\\nreasoning\\n</think>\\n\\nanswer<end>

So it is with templates whose prompt opens a block, or supplies an empty one, and with those that
rewrite earlier messages when the turn is there. The text found begins with the prompt, always.
"""

import re
from typing import NamedTuple

from lorafold.data.templates import OPENED, Block, common

CLOSED = re.compile(r"([<\[])(\w+)([>\]])\s*\1/\2\3\s*\Z")  # an empty block at a prompt's end
SEEN = 24  # characters of the message before the turn by which it is found again


class OpenBlock(NamedTuple):
    """The block at a prompt's end: where it begins, and whether the prompt closes it too."""

    at: int
    closed: bool
    block: Block


def after_block(
    prompt: str, after: str, said: tuple[str, str], block: Block, specials: re.Pattern[str]
) -> str | None:
    """The text of a turn whose prompt ends with a block of reasoning: the prompt, then what it
    leaves to the model (of one that opens a block reasoning, closing and answer; of one with an
    empty block the answer). None where no such form is found. `said` are the turn's reasoning, or
    an empty text, and its content; `after` is the rendering up to and including the turn.
    """
    block_at_end = _open_block(prompt, after, block, specials)
    if block_at_end is None or not after.startswith(prompt[: block_at_end.at]):
        return None
    answer, (reasoning, content) = after[block_at_end.at :], said
    opening, closing = block_at_end.block.opening, block_at_end.block.closing
    bare = answer.lstrip()
    if not bare:
        return None
    if bare.startswith(opening) and closing in bare:
        inner, _, answer = bare.removeprefix(opening).partition(closing)
        reasoning = reasoning or inner
    elif bare.startswith(closing):
        if not block_at_end.closed and not reasoning.strip():
            return prompt + bare  # an empty block, as the template writes it
        answer = bare.removeprefix(closing)
    elif closing in content:
        reasoning = reasoning or content.partition(closing)[0].rpartition(opening)[2]
    if block_at_end.closed:
        return prompt + answer.lstrip("\n")
    lead, between = block_at_end.block.lead, block_at_end.block.between
    left = prompt[block_at_end.at + len(opening) :]
    first = lead.removeprefix(left) if lead.startswith(left) else ""
    spaced = between != between.rstrip()
    return f"{prompt}{first}{reasoning.strip()}{between}{answer.lstrip() if spaced else answer}"


def _open_block(
    prompt: str, after: str, block: Block, specials: re.Pattern[str]
) -> OpenBlock | None:
    bare = prompt.rstrip()
    if bare.endswith(block.opening):
        return OpenBlock(len(bare) - len(block.opening), False, block)
    inside = bare.removesuffix(block.closing).rstrip()
    if inside != bare and inside.endswith(block.opening):
        return OpenBlock(len(inside) - len(block.opening), True, block)
    for pattern, closed in ((CLOSED, True), (OPENED, False)):
        if found := pattern.search(prompt):
            left, name, right = found.groups()
            tagged = Block.of_tags(f"{left}{name}{right}", f"{left}/{name}{right}")
            return OpenBlock(found.start(), closed, tagged)
    at = len(common(prompt, after))
    at = next((m.start() for m in specials.finditer(prompt) if m.start() < at < m.end()), at)
    # one token opens it, a word may name it, and another token closes it
    marks = [m.span() for m in specials.finditer(prompt, at)]
    if len(marks) == 2 and marks[0][0] == at and not prompt[marks[1][1] :].strip():
        (_, opened), (closing, end) = marks
        if re.fullmatch(r"\w*\s*", prompt[opened:closing]):
            block = Block.of_tags(prompt[at:closing].rstrip(), prompt[closing:end])
            return OpenBlock(at, True, block)
    return None


def after_rewriting(prompt: str, after: str, before: str, content: str) -> str | None:
    """The text of a turn at whose arrival the template rewrites earlier messages: the prompt, then
    what follows the same end of a prompt in `after`, the rewritten text. None where it is not
    found. `before` is the prompt's rendering without the generation prompt.
    """
    if not prompt.startswith(before) or len(prompt) == len(before):
        return None
    end = prompt[max(0, len(before) - SEEN) :]
    at = after.rfind(end)
    said = after[at + len(end) :]
    return prompt + said if at >= 0 and said.strip() and content.strip() in said else None
