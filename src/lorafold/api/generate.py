"""`lf.generate`: the completions of one prompt or of several."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lorafold.api.arguments import Paths, as_paths, missing
from lorafold.api.opened import at_hand, opened
from lorafold.data.control_tokens import allow
from lorafold.data.messages import tool_problems, tools_of
from lorafold.data.render import prompt_of
from lorafold.data.shapes import Conversation
from lorafold.engine import Sampling
from lorafold.errors import LorafoldError
from lorafold.generation import complete
from lorafold.peft.saved import open_all

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Prompts = TypeVar("Prompts", str, list[str])  # a prompt gives a completion, a list a list


def generate(
    model: str | Path | PreTrainedModel | None = None,
    prompts: Prompts | None = None,
    *,
    adapters: Paths = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    system: str | None = None,
    tools: str | Sequence[Mapping[str, Any]] = (),
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    allow_control_tokens: bool = False,
    storage: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
    console: Console | None = None,
) -> Prompts:
    """The completion of a prompt, or of each of several, without special tokens.

    Args:
        model: A name or path, or a loaded model, which is used with its active adapters and
            takes no other `storage`, `device`, `revision` or `allow_other_base`. None takes the
            base that the adapters say they were trained on; without adapters smollm2.
        prompts: The user's message, which the chat template renders, or a list of messages, which
            gives a list of completions.
        adapters: Saved adapters to load on a model that is named.
        tokenizer: None takes that of the adapters or the model.
        system: A system message before each prompt; None takes the chat template's default.
        tools: JSON schemas of functions that the model may call, or JSON text of their list.
        max_new_tokens: The most tokens of a completion.
        temperature: 0 takes the most likely token; above 0 tokens are sampled.
        seed: The samples of every prompt follow from it.
        allow_control_tokens: Control tokens in messages are tokens; else they are read as text.
        storage: How the base stores its weights: auto, fp32, bf16, nf4 or int8.
        device: cpu, cuda, cuda:N or mps; None takes the fastest that is available.
        revision: The branch, tag or commit of a hub model.
        trust_remote_code: Run Python code that comes with the model.
        allow_other_base: Accept adapters whose fingerprint names another base.
        console: A rich console for notices; None is quiet.

    Raises LorafoldError for a model or adapter that can't be loaded, a negative temperature, and a
    prompt that the template refuses or that has no tokens.
    """
    if prompts is None:
        raise missing("prompts")
    found = open_all(as_paths(adapters))
    chosen = at_hand(
        model,
        found,
        console,
        storage=storage,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_other_base=allow_other_base,
    )
    loaded, tokenizer = opened(chosen, found, tokenizer, console=console)
    asked = [prompts] if isinstance(prompts, str) else prompts
    if allow_control_tokens:
        tokenizer = copy.copy(tokenizer)  # it may be the caller's
        allow(tokenizer)
    texts = [rendered(prompt, system, tokenizer, tools) for prompt in asked]
    sampling = Sampling(temperature=temperature, seed=seed)
    made = complete(loaded, tokenizer, texts, max_new_tokens, sampling)
    return made[0] if isinstance(prompts, str) else made


def rendered(
    prompt: str,
    system: str | None,
    tokenizer: PreTrainedTokenizerBase,
    tools: str | Sequence[Mapping[str, Any]] = (),
) -> str:
    """A prompt as the chat template renders it.

    Args:
        prompt: The user's message.
        system: A system message, or None.
        tokenizer: With the chat template.
        tools: JSON schemas of functions that the model may call, or JSON text of their list.

    Raises LorafoldError where the template refuses the messages or does not show the tools, and for
    tools that are no schemas.
    """
    given = tools if isinstance(tools, str) else [dict(tool) for tool in tools]
    if problems := list(tool_problems(given)):
        raise LorafoldError("; ".join(problems))
    before = [] if system is None else [{"role": "system", "content": system}]
    asked = Conversation([*before, {"role": "user", "content": prompt}], 0, tools_of(given))
    return prompt_of(asked, tokenizer)
