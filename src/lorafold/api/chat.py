"""`lf.chat`: a conversation with a base and its adapters."""

from typing import TYPE_CHECKING, Unpack

from lorafold.api import options as opt

if TYPE_CHECKING:
    from lorafold.conversation import Chat


@opt.verb
def chat(
    model: opt.Model = None,
    adapters: opt.Adapters = (),
    *,
    system: opt.System = None,
    max_new_tokens: opt.NewTokens = 256,
    temperature: opt.Temperature = 0.0,
    seed: opt.Seed = 0,
    allow_control_tokens: opt.ControlTokens = False,
    console: opt.Progress = None,
    **opening: Unpack[opt.Opening],
) -> "Chat":
    """Talk to the model; each answer sees the conversation so far, and streams to stdout.

    The model is loaded once, and adapters are switched as you talk: all of them answer, stacked as
    for generate, until /adapter NAME chooses one. Ctrl-C stops an answer; at the
    prompt it leaves with exit code 130. Where stdin is no terminal, each of its lines is a message
    or a command; stdout then has the answers alone, and notices go to stderr. A line that begins
    with / is a command; // begins a message with one.

    In Python it returns a context manager: `turn = chat.ask(text)`, then `chat.answer(turn,
    chat.active)` streams, and `chat.keep` remembers. `Chat.switch` knows adapters by the last parts
    of their paths; each later turn has the next seed.

    Raises LorafoldError for a model or adapter that can't be loaded.

    Examples:
        lorafold chat
        lorafold chat demo/adapter
        lorafold chat demo/adapter --system "Answer in JSON." --temperature 0.7

    Notes:
        /adapter NAME: one adapter answers; all: all of them; none: the base; no name: the list.
        /both: the base answers too, beside the adapter; /both again ends that.
        /system TEXT: set the system message; none takes it away; no text: what it is.
        /reset: forget the conversation (or /new); adapter and system message stay.
        /save FILE: add the conversation to FILE.jsonl, as a row that lorafold train reads.
        /help: this list.
        /quit: the end, as Ctrl-D.
    """
    from lorafold.api.arguments import as_paths
    from lorafold.api.loaded_model import opened
    from lorafold.conversation import Chat, unique_names
    from lorafold.data.control_tokens import allow
    from lorafold.engine import Sampling
    from lorafold.peft.saved import open_all
    from lorafold.resolve import base_for

    paths = as_paths(adapters)
    found = open_all(paths)
    base = base_for(model, found, console, **opening)
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
