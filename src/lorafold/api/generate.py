"""`lf.generate`: complete one prompt or several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar, Unpack

from lorafold.api import options as opt
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Texts = TypeVar("Texts", str, list[str])
Messages = list[dict[str, Any]]
PROMPT = opt.Option(kind=str, flag="--prompt", required=True)


class RenderedPrompts(NamedTuple):
    """A model, its tokenizer, and prompts rendered with the chat template."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    texts: list[str]


class Rendering(opt.BaseOptions, total=False):
    system: opt.System
    tools: Annotated[
        str | Sequence[Mapping[str, Any]],
        opt.Option(
            "A JSON file with a list of functions that the model may call. In Python, their JSON"
            " schemas or the JSON text of the list.",
            kind=Path,
            default=(),
        ),
    ]
    allow_control_tokens: opt.ControlTokens


@opt.verb
def generate(
    model: opt.ModelOrLoaded = None,
    prompts: Annotated[Texts | Messages | list[Messages] | None, PROMPT] = None,
    *,
    adapters: opt.Adapters = (),
    tokenizer: opt.Tokenizer = None,
    max_new_tokens: opt.NewTokens = 256,
    temperature: opt.Temperature = 0.0,
    seed: opt.Seed = 0,
    console: opt.Progress = None,
    **rendering: Unpack[Rendering],
) -> Texts:
    """Complete one prompt. The text streams to stdout, the speed goes to stderr.

    With `tools`, function calls in the completion are parsed: they are listed on stderr and in the
    JSON, as null if they can't be parsed.

    In Python, a prompt can also be a list of messages. The text is returned, or a list of texts for
    a list of prompts; `lf.parse_calls` parses function calls.

    Args:
        prompts: The user message, rendered with the model's chat template.

    Raises LorafoldError for a model or adapter that can't be loaded, a negative temperature, and a
    prompt that the template rejects or that has no tokens.

    Examples:
        lorafold lab generate demo/adapter --prompt "a table for two at Noma"
        lorafold lab generate --prompt "What is an adapter?" --max-new-tokens 40
        lorafold lab generate demo/adapter --prompt "a table" --temperature 0.7
    """
    from lorafold.api.arguments import missing_argument
    from lorafold.engine import Sampling
    from lorafold.generation import complete

    if prompts is None:
        raise missing_argument("prompts")
    given: Any = prompts
    is_single = not isinstance(given, list | tuple) or isinstance([*given, ""][0], dict)
    prompt_list = [given] if is_single else given
    rendered = prepare_prompts(model, prompt_list, adapters, tokenizer, console, **rendering)
    sampling = Sampling(temperature=temperature, seed=seed)
    completions: Any = complete(*rendered, max_new_tokens, sampling)
    return completions[0] if is_single else completions


def prepare_prompts(
    model: opt.ModelOrLoaded,
    prompts: Sequence[str | Messages],
    adapters: opt.Paths = (),
    tokenizer: opt.Tokenizer = None,
    console: opt.Progress = None,
    *,
    system: str | None = None,
    tools: str | Sequence[Mapping[str, Any]] = (),
    allow_control_tokens: bool = False,
    **base_options: Any,
) -> RenderedPrompts:
    """Loads the model and renders the prompts for the arguments of `generate`."""
    import copy

    from lorafold.api.model_arguments import load_with_adapters, resolve_model
    from lorafold.data.control_tokens import allow_tokens

    base, saved = resolve_model(model, adapters, console, **base_options)
    loaded, own = load_with_adapters(base, saved, tokenizer, console=console)
    if allow_control_tokens:
        own = copy.copy(own)  # the caller may still use the tokenizer
        allow_tokens(own)
    return RenderedPrompts(
        loaded, own, [render_prompt(prompt, system, own, tools) for prompt in prompts]
    )


def render_prompt(
    prompt: str | Messages,
    system: str | None,
    tokenizer: "PreTrainedTokenizerBase",
    tools: str | Sequence[Mapping[str, Any]] = (),
) -> str:
    from lorafold.data.formats import PROMPT_ONLY, PROMPTS
    from lorafold.data.messages import ROLES
    from lorafold.data.render import prompt_of

    offered = tools if isinstance(tools, str) else [dict(tool) for tool in tools]
    row = {"prompt": prompt, "system": system, "tools": offered}
    if problems := list(PROMPT_ONLY.problems(row)):
        raise LorafoldError("; ".join(problems))
    given = PROMPT_ONLY.extract(PROMPTS, row | {"system": None})
    roles = [message["role"] for message in given.messages]
    if wrong := [role for role in roles if role not in ROLES.values() or roles[-1] == "assistant"]:
        expected = f"{', '.join(dict.fromkeys(ROLES.values()))}, and not assistant last"
        raise LorafoldError(f"field prompt: found the role {wrong[-1]!r}, expected {expected}")
    if system is not None:  # the row's field ignores an empty text
        given.messages.insert(0, {"role": "system", "content": system})
    return prompt_of(given, tokenizer)
