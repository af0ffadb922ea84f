"""The server's view of an adapter's tokenizer.

It decodes with the base's tokenizer, which is not copied, and the adapter's new tokens. The
adapter's untrusted chat template and tokenization run in a worker process that can be killed.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from jinja2 import TemplateError

from lorafold.errors import LorafoldError
from lorafold.verification.worker_pool import CheckFailed

# cached renderings of test conversations, and characters of each
MAX_PROBES, MAX_PROBE_LENGTH = 256, 1 << 16
MAX_CRASHES, CRASH_SECONDS = 3, 60.0  # worker crashes per tokenizer in a period


class AdapterTokenizer:
    """A tokenizer for `lorafold.data` and the engine. `call` runs an action in a worker process."""

    is_fast = False  # no backend_tokenizer with the new tokens exists in this process

    def __init__(
        self, about: Mapping[str, Any], base: Any, known: Mapping[int, Any],
        call: Callable[..., Any],
    ) -> None:  # fmt: skip
        from transformers import AddedToken

        self._process_call, self._caching = call, True
        self._crashes = deque([-math.inf] * MAX_CRASHES, MAX_CRASHES)  # times
        self._probes: dict[str, str | TemplateError] = {}
        self.chat_template = about["template"]
        self.special_tokens_map: Mapping[str, Any] = about["special"]
        self.eos_token_id: int | None = about["eos"]
        self.variables = frozenset(about["variables"])
        new = about["new"]
        self._base, self._texts = base, {number: text for number, text, _ in new}
        added = {n: AddedToken(text, special=s, normalized=False) for n, text, s in new}
        self.added_tokens_decoder = {**known, **added}
        self._special = {t.content for t in self.added_tokens_decoder.values() if t.special}
        self._numbers = {text: number for number, text in self._texts.items()}
        self._size = len(base) + len(new)
        for expected, (number, text, _) in enumerate(new, len(base)):
            if number != expected:
                raise LorafoldError(
                    f"the ID of the new token {text!r:.80} is {number}, expected {expected}"
                )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def __len__(self) -> int:
        return self._size

    def __call__(
        self, text: str, add_special_tokens: bool = True, sanitize_control_tokens: bool = False,
        **_: Any,
    ) -> Any:  # fmt: skip
        """Returns an object with the text's `input_ids`. With `sanitize_control_tokens`, tokens
        that `data.control_tokens` marked in the text are tokenized as text.
        """
        ids = self._call(
            "tokens", text=text, special=add_special_tokens, marked=sanitize_control_tokens
        )
        if not all(isinstance(i, int) and 0 <= i < self._size for i in ids):
            raise LorafoldError("the adapter's tokenizer returns unknown token IDs")
        return SimpleNamespace(input_ids=ids)

    def get_vocab(self) -> dict[str, int]:
        return self._base.get_vocab() | self._numbers

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        if isinstance(ids, int):
            return self._texts.get(ids) or self._base.convert_ids_to_tokens(ids)
        return [self.convert_ids_to_tokens(number) for number in ids]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        if isinstance(tokens, str):
            return self._numbers.get(tokens) or self._base.convert_tokens_to_ids(tokens)
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:  # fmt: skip
        if self._texts.keys().isdisjoint(ids):
            return str(
                self._base.decode(
                    ids, skip_special_tokens=skip_special_tokens,
                    clean_up_tokenization_spaces=clean_up_tokenization_spaces,
                )
            )  # fmt: skip
        tokens = [token for token in self.convert_ids_to_tokens(ids) if token is not None]
        if skip_special_tokens:
            tokens = [token for token in tokens if token not in self._special]
        decoder = self._base.backend_tokenizer.decoder
        return " ".join(tokens) if decoder is None else str(decoder.decode(tokens))

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        if isinstance(self.chat_template, str):
            return self.chat_template
        name = "tool_use" if tools and "tool_use" in self.chat_template else "default"
        return str(self.chat_template.get(name, ""))

    def apply_chat_template(
        self, messages: Sequence[Any], tools: Any = None, tokenize: bool = False,
        add_generation_prompt: bool = False, **variables: Any,
    ) -> str:  # fmt: skip
        """Renders a conversation. Raises jinja2's TemplateError if rendering fails."""
        conversation = {
            "messages": list(messages), "tools": tools,
            "add_generation_prompt": add_generation_prompt, "variables": variables,
        }  # fmt: skip
        key = json.dumps(conversation, sort_keys=True, default=str)
        if (text := self._probes.get(key)) is None:
            try:
                text = str(self._call("render", **conversation))
                if self._caching and len(text) > MAX_PROBE_LENGTH:
                    text = TemplateError(f"a test prompt has {len(text):,} characters, too many")
            except CheckFailed as error:
                text = TemplateError(str(error))
            if self._caching and len(self._probes) < MAX_PROBES:
                self._probes[key] = text
        if isinstance(text, TemplateError):
            raise text
        return text

    def stop_caching(self) -> None:
        """Stops caching, so that no renderings of users' conversations are stored."""
        self._caching = False

    def _call(self, do: str, **arguments: Any) -> Any:
        """Calls a worker process, unless this tokenizer recently crashed several."""
        if time.monotonic() - self._crashes[0] < CRASH_SECONDS:
            raise CheckFailed(
                f"the tokenizer crashed {MAX_CRASHES} processes within {CRASH_SECONDS:.0f} s"
            )
        try:
            return self._process_call(do, **arguments)
        except CheckFailed as error:
            if not error.kind:
                self._crashes.append(time.monotonic())
            raise
