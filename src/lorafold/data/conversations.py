"""What shapes give of rows and encoders take: conversations, completions to compare, labels."""

from dataclasses import dataclass
from typing import Any

from lorafold.data.messages import Message, Tool


@dataclass(frozen=True)
class Conversation:
    """The messages of one row, in the form of `data.messages`, and the tools that it offers. The
    assistant turns from index `trained` on are trained on, but for those of `left`. Plain text is
    one without messages.
    """

    messages: list[Message]
    trained: int = 0
    tools: tuple[Tool, ...] = ()
    text: str = ""

    @property
    def left(self) -> frozenset[int]:
        """The indices of the messages that are not trained on, as their row says."""
        return frozenset(n for n, one in enumerate(self.messages) if one.get("weight") == 0)

    @property
    def turns(self) -> list[int]:
        """The indices of the assistant turns that are trained on."""
        left, messages = self.left, enumerate(self.messages)
        said = [n for n, one in messages if one["role"] == "assistant" and n not in left]
        return [n for n in said if n >= self.trained]


@dataclass(frozen=True)
class Compared:
    """What one example of preferences is made of: a prompt, its completions by the name of their
    field, the tools, and the judgement of a single completion, which has yet to be checked.
    """

    prompt: list[Message]
    completions: dict[str, list[Message]]
    tools: tuple[Tool, ...] = ()
    desirable: Any = True

    def conversations(self) -> list[Conversation]:
        """Each completion after the prompt."""
        before = self.prompt
        return [
            Conversation([*before, *said], len(before), self.tools)
            for said in self.completions.values()
        ]


@dataclass(frozen=True)
class Labelled:
    """A text and its label, text or a whole number."""

    text: str
    label: str | int
