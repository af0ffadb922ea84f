"""What a chat template does with a conversation that its user can't see in a row: said before it is
used.

    account = account_of(tokenizer)
    account.line                    one line, for the beginning of a run
    account.lines                   the same in full, a line each

All of it is found by rendering probes (`data.endings`, `data.reasoning`, `data.template_forms`).
"""

import copy
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorafold.data.conversations import Conversation
from lorafold.data.endings import NOWHERE, WITH_TURN, ending_of, specials_of
from lorafold.data.messages import Message
from lorafold.data.omissions import shows_calls, shows_tools
from lorafold.data.reasoning import block_of
from lorafold.data.template_forms import (
    ASKED,
    KEY,
    NAME,
    VALUE,
    attempt,
    call,
    form_of,
    is_dated,
    template_of,
)
from lorafold.data.trained_spans import render_trained
from lorafold.errors import LorafoldError
from lorafold.models.templates import set_variables, variables_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BESIDE, OTHER = "probe beside", "probe other value"
ROLES = {"", "system", "user", "assistant", "model", "human"}
WORDS = re.compile(r"[^\W\d_]{2,}")
LEFT_OUT = "turns without reasoning are left out, since generation would begin them otherwise"
SHOWN = 60  # characters of a text that the template supplies


@dataclass(frozen=True)
class Account:
    """What a template does.

    end: What ends a turn; empty if nothing does.
    ended: With what the end is written, as `Ending.written`.
    prompt: What the generation prompt adds of reasoning: it opens a block, has an empty one, or
        nothing.
    system: The words that the template puts before a conversation without a system message.
    dated: It writes the date of the day.
    hides: The parts of a conversation that it does not show.
    plain: Why plain turns can't be trained; empty if they can.
    """

    end: str
    ended: str
    prompt: str
    system: str
    dated: bool
    hides: tuple[str, ...]
    plain: str = ""

    @property
    def lines(self) -> list[str]:
        """What there is to know, a line each."""
        end = f"a turn ends with {self.end}"
        if self.ended == NOWHERE:
            end = (
                f"it ends no turn: {self.end} is trained after each (not with --end-of-turn none)"
                if self.end
                else "it ends no turn, and the tokenizer has no end token: a model never stops"
            )
        elif self.ended != WITH_TURN:
            end += ", which it writes before the next message only"
        found = [end]
        if self.prompt:
            found.append(f"the prompt {self.prompt}")
        if self.system:
            found.append(f"without a system message it writes {self.system!r}")
        if self.dated:
            found.append("it writes the date of the day")
        if self.hides:
            found.append(f"it does not show {', '.join(self.hides)}")
        if self.plain:
            found.append(self.plain)
        return found

    @property
    def line(self) -> str:
        """The same as one line."""
        return f"chat template: {'; '.join(self.lines)}"

    def as_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def account_of(tokenizer: "PreTrainedTokenizerBase") -> Account:
    """What the tokenizer's chat template does.

    Args:
        tokenizer: A tokenizer with a chat template.
    """
    ending = ending_of(tokenizer)
    return Account(
        ending.text.strip(),
        ending.written,
        _of_prompt(tokenizer),
        _system(tokenizer),
        is_dated(tokenizer),
        tuple(_hidden(tokenizer)),
        _plain(tokenizer),
    )


def _plain(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Why turns without reasoning can't be trained, and which variable of the template helps."""
    if not (told := _untrained(tokenizer)):
        return ""
    with suppress(LorafoldError):
        for name in sorted(variables_of(tokenizer)):
            for value in (False, True):
                with_value = copy.copy(tokenizer)
                set_variables(with_value, {name: value})
                if not _untrained(with_value):
                    return f"{told}; --template-kwargs {name}={str(value).lower()} helps"
    return told


def _untrained(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Why a plain turn can't be trained; empty if it can."""
    said: Message = {"role": "assistant", "content": VALUE}
    try:
        found = render_trained(Conversation([ASKED, said]), tokenizer)
    except LorafoldError as error:
        return f"a plain conversation is refused ({error})"
    return LEFT_OUT * found.left_out


def _of_prompt(tokenizer: "PreTrainedTokenizerBase") -> str:
    form, block = form_of(tokenizer), block_of(tokenizer)
    asked = form.of([ASKED])
    bare = attempt(asked, tokenizer).rstrip()
    added = attempt(asked, tokenizer, for_generation=True).removeprefix(bare).strip()
    if added.endswith(block.opening):
        return f"opens a block of reasoning ({block.opening})"
    if block.opening in added and block.closing in added:
        return f"has an empty block of reasoning ({block.opening}{block.closing})"
    return ""


def _system(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The words before the first message that are no role's."""
    text = attempt(form_of(tokenizer).of([ASKED]), tokenizer)
    before = specials_of(tokenizer).sub("\n", text.partition(str(ASKED["content"]))[0])
    lines = (line.strip() for line in before.splitlines())
    said = " ".join(line for line in lines if line.strip("#: ").lower() not in ROLES)
    if len(WORDS.findall(said)) < 3:
        return ""
    return said if len(said) <= SHOWN else f"{said[:SHOWN].rstrip()}..."


def _hidden(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    template, form = template_of(tokenizer), form_of(tokenizer)
    system: Message = {"role": "system", "content": VALUE}
    found = [] if VALUE in attempt(form.of([system, ASKED]), tokenizer) else ["system messages"]
    if not shows_tools(template_of(tokenizer, [call(NAME, {})]), tokenizer):
        found.append("tools")
    if not shows_calls(template, tokenizer):
        found.append("calls")
    else:
        calls = [call(NAME, {KEY: value}) | {"id": f"probe000{n}"}
                 for n, value in enumerate((VALUE, OTHER))]  # fmt: skip
        said: Message = {"role": "assistant", "content": BESIDE, "tool_calls": calls[:1]}
        text = attempt(form.of([ASKED, said]), tokenizer)
        found += ["what is said beside a call"] * (BESIDE not in text)
        both: Message = {"role": "assistant", "content": "", "tool_calls": calls}
        found += ["a second call"] * (OTHER not in attempt(form.of([ASKED, both]), tokenizer))
    return found + ["reasoning"] * (not block_of(tokenizer).shown)
