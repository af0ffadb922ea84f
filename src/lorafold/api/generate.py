"""`lf.generate`: the completions of one prompt or of several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar, Unpack

from lorafold.api import options as opt
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Prompts = TypeVar("Prompts", str, list[str])  # a prompt gives a completion, a list a list


class RenderedPrompts(NamedTuple):
    """A model, its tokenizer, and the prompts as the chat template renders them."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    texts: list[str]


@opt.verb
def generate(
    model: opt.ModelOrLoaded = None,
    prompts: Annotated[Prompts | None, opt.Option(kind=str, flag="--prompt", required=True)] = None,
    *,
    adapters: opt.Adapters = (),
    tokenizer: opt.Tokenizer = None,
    system: opt.System = None,
    tools: Annotated[str | Sequence[Mapping[str, Any]], opt.Option(kind=Path)] = (),
    max_new_tokens: opt.NewTokens = 256,
    temperature: opt.Temperature = 0.0,
    seed: opt.Seed = 0,
    allow_control_tokens: opt.ControlTokens = False,
    console: opt.Progress = None,
    **opening: Unpack[opt.Opening],
) -> Prompts:
    """Complete one prompt. The text goes to stdout as it is generated, the speed to stderr.

    With `tools`, the calls in it are read back: they are listed on stderr, and in the JSON, which
    has null for calls that can't be read.

    In Python the text is returned, and of a list of prompts a list; `lf.parse_calls` reads calls.

    Args:
        prompts: The user's message, which the model's chat template renders.
        tools: A JSON file with a list of functions that the model may call. In Python their JSON
            schemas, or JSON text of their list.

    Raises LorafoldError for a model or adapter that can't be loaded, a negative temperature, and a
    prompt that the template refuses or that has no tokens.

    Examples:
        lorafold generate demo/adapter --prompt "a table for two at Noma at 7pm"
        lorafold generate --prompt "What is a low-rank adapter?" --max-new-tokens 40
        lorafold generate demo/adapter --prompt "a table for two" --temperature 0.7
    """
    from lorafold.api.arguments import missing
    from lorafold.engine import Sampling
    from lorafold.generation import complete

    if prompts is None:
        raise missing("prompts")
    asked = [prompts] if isinstance(prompts, str) else prompts
    ready = prepared(
        model,
        asked,
        adapters=adapters,
        tokenizer=tokenizer,
        system=system,
        tools=tools,
        allow_control_tokens=allow_control_tokens,
        console=console,
        **opening,
    )
    sampling = Sampling(temperature=temperature, seed=seed)
    made = complete(ready.model, ready.tokenizer, ready.texts, max_new_tokens, sampling)
    return made[0] if isinstance(prompts, str) else made


def prepared(
    model: opt.ModelOrLoaded = None,
    prompts: Sequence[str] = (),
    *,
    adapters: opt.Adapters = (),
    tokenizer: opt.Tokenizer = None,
    system: opt.System = None,
    tools: str | Sequence[Mapping[str, Any]] = (),
    allow_control_tokens: bool = False,
    console: opt.Progress = None,
    **opening: Unpack[opt.Opening],
) -> RenderedPrompts:
    """What `generate` computes with, from its arguments. Raises LorafoldError as it does."""
    import copy

    from lorafold.api.arguments import as_paths
    from lorafold.api.loaded_model import at_hand, opened
    from lorafold.data.control_tokens import allow
    from lorafold.peft.saved import open_all

    found = open_all(as_paths(adapters))
    loaded, own = opened(
        at_hand(model, found, console, **opening), found, tokenizer, console=console
    )
    if allow_control_tokens:
        own = copy.copy(own)  # it may be the caller's
        allow(own)
    return RenderedPrompts(
        loaded, own, [rendered(prompt, system, own, tools) for prompt in prompts]
    )


def rendered(
    prompt: str,
    system: str | None,
    tokenizer: "PreTrainedTokenizerBase",
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
    from lorafold.data.messages import tool_problems, tools_of
    from lorafold.data.render import prompt_of
    from lorafold.data.shapes import Conversation

    given = tools if isinstance(tools, str) else [dict(tool) for tool in tools]
    if problems := list(tool_problems(given)):
        raise LorafoldError("; ".join(problems))
    before = [] if system is None else [{"role": "system", "content": system}]
    asked = Conversation([*before, {"role": "user", "content": prompt}], 0, tools_of(given))
    return prompt_of(asked, tokenizer)
