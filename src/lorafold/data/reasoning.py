"""The reasoning block of an assistant turn: how a chat template encloses it, where it is in a text.

    block = block_of(tokenizer)                 its opening and closing, as in <think> and </think>
    block.end(text, prompt)                     where the block ends that the text begins with, or 0

The block is found by rendering a probe with reasoning and without. A template that shows none is
taken to have <think> and </think>, which rows may have in their contents.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from lorafold.data.template_forms import ASKED, KNOWN, Form, attempt, common, form_of, template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THOUGHT, WORD = "probe thought", "probe answer"
OPENED = re.compile(r"([<\[])(\w+)([>\]])\s*\Z")  # a tag that the generation prompt leaves open


@dataclass(frozen=True)
class Block:
    """What stands before and after the reasoning of a turn, without surrounding whitespace.

    `shown` is whether the chat template shows the reasoning of the last turn, `spaced` whether the
    whitespace after the closing belongs to the block; `lead` and `between` are what stands before
    the reasoning and behind it, the opening left out.
    """

    opening: str
    closing: str
    shown: bool
    spaced: bool
    lead: str
    between: str

    @classmethod
    def of_tags(cls, opening: str, closing: str) -> "Block":
        """The block of a template that shows no reasoning, with tags on lines of their own."""
        return cls(opening, closing, False, True, "\n", f"\n{closing}\n\n")

    def end(self, text: str, prompt: str) -> int:
        """The length of the block at the beginning of a turn, with whitespace after it; 0 without
        one. The opening may stand at the end of the prompt.
        """
        start = len(text) - len(text.lstrip())
        if text.startswith(self.opening, start):
            start += len(self.opening)
        elif not prompt.rstrip().endswith(self.opening):
            return 0
        at = text.find(self.closing, start)
        if at < 0:
            return 0
        end = at + len(self.closing)
        if not self.spaced:
            return end
        return end + len(text[end:]) - len(text[end:].lstrip())


def block_of(tokenizer: "PreTrainedTokenizerBase") -> Block:
    """How the tokenizer's chat template encloses reasoning."""
    return _block_of(template_of(tokenizer), tokenizer)


@lru_cache(maxsize=KNOWN)
def _block_of(template: str, tokenizer: "PreTrainedTokenizerBase") -> Block:
    usual = Block.of_tags("<think>", "</think>")
    form = Form(parts=form_of(tokenizer).parts)
    said = {"role": "assistant", "content": WORD}
    texts = [
        attempt(form.of([ASKED, turn]), tokenizer)
        for turn in (said | {"reasoning_content": THOUGHT}, said)
    ]
    prompt = attempt(form.of([ASKED]), tokenizer, for_generation=True)
    if THOUGHT not in texts[0] or WORD not in texts[0]:
        return usual
    header = common(*texts, prompt)
    # a tag that the prompt leaves open is part of the block
    if opened := OPENED.search(header):
        header = header[: opened.start()]
    thoughtful, plain = (text[len(header) :] for text in texts)
    # the answer may have a header of its own, which belongs to no block
    without = thoughtful.removesuffix(plain) if plain else thoughtful
    for block in (without, thoughtful.partition(WORD)[0]):
        opening, _, closing = block.partition(THOUGHT)
        if opening.strip() and closing.strip() and WORD not in block:
            lead = opening[len(opening.rstrip()) :]
            spaced = closing != closing.rstrip()
            return Block(opening.strip(), closing.strip(), True, spaced, lead, closing)
    return usual
