"""Episodes: rollouts of several turns, between which an environment answers.

The tokens of an episode stay as they were sampled. The next turn's prompt is the rendering of the
whole conversation, whose beginning must be the text so far; only what follows it is tokenized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorafold.data.chat_template import prefix_of, template_of
from lorafold.data.control_tokens import MARK_END, MARK_START, rendered_ids
from lorafold.data.examples import NO_LOSS
from lorafold.data.formats import Conversation
from lorafold.data.json_input import find_unusable
from lorafold.data.messages import (
    Message,
    Tool,
    message_problems,
    normalize,
    openai_tools,
    tool_problems,
)
from lorafold.data.prompts import TokenizedPrompt
from lorafold.data.render import prompt_of
from lorafold.data.tool_calls import parse_calls
from lorafold.errors import LorafoldError, truncate
from lorafold.generation import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKS = str.maketrans("", "", MARK_START + MARK_END)
SHOWN = 60  # characters of a text in a message


class EpisodeOver(LorafoldError):
    """The rollout can't have another turn."""


@dataclass
class Episode:
    """A rollout of one turn or, in an environment, of several.

    Attributes:
        prompt: the row.
        ids: all of its tokens, with the end token of each turn that has ended.
        labels: the tokens that the model sampled, and NO_LOSS for all others.
        logprobs: the log-probability of each sampled token in nats at the time of sampling.
        start: the number of tokens of the first prompt.
        text: the text of the last turn.
        ended: whether the last turn has an end token.
        messages: the messages as the environment knows them.
        rewards: the numbers that the environment gave, by name.
        refused: why the rollout can't be trained, or empty.
    """

    tokenizer: PreTrainedTokenizerBase
    prompt: TokenizedPrompt
    max_turns: int
    max_new_tokens: int
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    start: int = 0
    text: str = ""
    ended: bool = True
    messages: Sequence[Message] = ()
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    refused: str = ""
    turns: int = 0
    _earlier: Sequence[Message] = ()  # all messages but the last turn, as they are rendered
    # forms of the last turn, of which one may render as it was sampled
    _last_turn: list[Message] = field(default_factory=list)
    _tools: tuple[Tool, ...] = ()
    _rendered: str = ""  # all messages

    def beginning(self, seed: int, temperature: float) -> dict[str, Any]:
        start = {"messages": self.prompt.conversation.messages, "temperature": temperature}
        return start | {"row": dict(self.prompt.row), "seed": seed % 2**31}

    def next_turn(self, request: Mapping[str, Any]) -> tuple[tuple[int, ...], int] | None:
        """The tokens from which to sample the next turn, and the maximum number of its tokens; None
        at the end.
        """
        if "reward" in request:
            self.rewards = request["reward"]
            return None
        problems = [*message_problems("messages", request["messages"])]
        problems += filter(None, [find_unusable({"messages": request["messages"]})])
        if problems := [*problems, *tool_problems(request["tools"])]:
            raise LorafoldError("; ".join(problems))
        given = normalize(request["messages"])
        if self.turns:
            if (tools := openai_tools(request["tools"])) and tools != self._tools:
                raise LorafoldError("tools: found others than in the first turn, expected the same")
            self._continue(given)
        else:
            own = self.prompt.conversation
            self._tools = openai_tools(request["tools"]) or own.tools
            self._earlier, self.messages, ids = given, given, self.prompt.ids
            if (given, self._tools) != (own.messages, own.tools):
                ids = tuple(rendered_ids(self._prompt(given), self.tokenizer))
            self._append(ids)
            self.start = len(ids)
        most = min(self.max_new_tokens, request["max_tokens"] or self.max_new_tokens)
        return tuple(self.ids), min(most, self._limit - len(self.ids))

    def _continue(self, given: list[Message]) -> None:
        if not self.ended:
            raise EpisodeOver("the last turn was cut off at a limit of tokens")
        if self.turns == self.max_turns:
            raise EpisodeOver(f"found another turn, expected at most {self.max_turns} (turns)")
        n = len(self.messages)
        for at, (found, own) in enumerate(zip(given, self.messages, strict=False)):
            if any(found.get(key) != own.get(key) for key in ("role", "content")):
                raise LorafoldError(
                    f"messages[{at}]: found {truncate(str(found.get('content')), SHOWN)!r},"
                    f" expected {truncate(str(own.get('content')), SHOWN)!r}: a rollout is one"
                    " conversation, whose earlier messages don't change"
                )
        if len(given) <= n:
            raise LorafoldError(f"messages: found {len(given)}, expected more than {n}")
        text = self._rendering(given[n:])
        places = [at for at, c in enumerate(text) if c not in MARK_START + MARK_END]
        # a mark before the text keeps tokenizers from inserting a space
        rest = MARK_START + text[places[len(self._rendered) - 1] + 1 :]
        self._append(rendered_ids(rest, self.tokenizer))
        self.messages, self._rendered = given, text.translate(MARKS)

    def _prompt(self, messages: Sequence[Message]) -> str:
        return prompt_of(Conversation([*messages], tools=self._tools), self.tokenizer)

    def _rendering(self, new: Sequence[Message]) -> str:
        """The conversation with these messages, which begins with the text so far."""
        for turn in self._last_turn:
            messages = [*self._earlier, turn, *new]
            text = self._prompt(messages)
            if (plain := text.translate(MARKS)).startswith(self._rendered):
                self._earlier = messages
                return text
        n = max(0, len(prefix_of(plain, self._rendered)) - SHOWN // 4)
        found, own = (repr(truncate(x[n:], SHOWN)) for x in (plain, self._rendered))
        self.refused = (
            f"the chat template renders an earlier turn as {found}, expected {own} as it was"
            " sampled; choose a template that keeps turns (--chat-template)"
        )
        raise EpisodeOver(self.refused)

    @property
    def _limit(self) -> int:
        return len(self.prompt.ids) + self.prompt.room + self.max_new_tokens

    def _append(self, ids: Sequence[int]) -> None:
        if (n := len(self.ids) + len(ids)) >= self._limit:
            kind = EpisodeOver if self.turns else LorafoldError
            raise kind(f"found {n} tokens, expected fewer than max_length={self._limit}")
        self.ids += ids
        self.labels += [NO_LOSS] * len(ids)

    def add_turn(
        self, tokens: Sequence[int], logprobs: Sequence[float], ended: bool
    ) -> dict[str, Any]:
        """Appends a sampled turn, and returns the response to the environment."""
        if not self._rendered and self.max_turns > 1:
            self._rendered = self._prompt(self._earlier).translate(MARKS)
        self.ids += tokens
        self.labels += tokens
        self.logprobs += logprobs
        self.turns, self.ended, self.text = self.turns + 1, ended, decode(self.tokenizer, tokens)
        raw, before = self._raw(tokens[:-1] if ended else tokens), self._rendered
        self._rendered += self._raw(tokens)
        message: Message = {"role": "assistant", "content": self.text}
        block = template_of(self.tokenizer).block
        end, problem = block.end(raw, before), ""
        thought = raw[:end].replace(block.opening, "").replace(block.closing, "").strip()
        parts = {"role": "assistant"} | ({"reasoning_content": thought} if thought else {})
        self._last_turn = [message | {"content": raw}, parts | {"content": raw[end:].strip()}]
        try:
            if self._tools and (calls := parse_calls(raw, self.tokenizer, self._tools)):
                calls = [{"id": f"{self.turns}_{n}"} | call for n, call in enumerate(calls)]
                message["tool_calls"] = calls
                self._last_turn.append(parts | {"tool_calls": calls})
        except (LorafoldError, RecursionError) as error:
            problem = str(error)
        self.messages = [*self.messages, message]
        return {"message": message, "ended": "stop" if ended else "length", "problem": problem}

    def _raw(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode([*tokens], clean_up_tokenization_spaces=False))
