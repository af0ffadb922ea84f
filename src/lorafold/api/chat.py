"""`lf.chat`: a conversation with a base and its adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.api.arguments import Paths, as_paths
from lorafold.api.opened import opened
from lorafold.conversation import Chat, unique_names
from lorafold.data.control_tokens import allow
from lorafold.engine import Sampling
from lorafold.opening import base_for
from lorafold.peft.saved import open_all

if TYPE_CHECKING:
    from rich.console import Console


def chat(
    model: str | Path | None = None,
    adapters: Paths = (),
    *,
    system: str | None = None,
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
) -> Chat:
    """Begin a conversation in which all adapters are active, one over the other. It is a context
    manager: `turn = chat.ask(text)`, then `chat.answer(turn, chat.active)` streams, and `chat.keep`
    remembers.

    Args:
        model: A name or path as `lf.load_model` takes it; None takes the base that the adapters
            say they were trained on, and without adapters smollm2.
        adapters: Saved adapters, which `Chat.switch` knows by the last parts of their paths.
        system: The system message; None takes the chat template's default.
        max_new_tokens: An answer ends after this many tokens at the latest.
        temperature: 0 takes the most likely token; above 0 tokens are sampled.
        seed: The seed of the first answer; each later turn has the next one.
        allow_control_tokens: Control tokens in messages are tokens; else they are read as text.
        storage: How the base stores its weights: auto, fp32, bf16, nf4 or int8.
        device: cpu, cuda, cuda:N or mps; None takes the fastest that is available.
        revision: The branch, tag or commit of a hub model.
        trust_remote_code: Run Python code that comes with the model.
        allow_other_base: Accept adapters whose fingerprint names another base.
        console: A rich console for notices; None is quiet.

    Raises LorafoldError for a model or adapter that can't be loaded.
    """
    paths = as_paths(adapters)
    found = open_all(paths)
    base = base_for(
        model,
        found,
        console,
        storage=storage,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_other_base=allow_other_base,
    )
    loaded, tokenizer = opened(base, found, console=console)
    if allow_control_tokens:
        allow(tokenizer)
    attached = (f"adapter{number}" for number in range(1, len(paths) + 1))  # the names of `opened`
    return Chat(
        loaded,
        tokenizer,
        dict(zip(unique_names(paths), attached, strict=True)),
        system=system,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=temperature, seed=seed),
    )
