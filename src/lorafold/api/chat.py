"""`lf.chat`: a conversation with a base model and its adapters."""

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
    **base_options: Unpack[opt.BaseOptions],
) -> "Chat":
    """Chat with the model. Answers stream to stdout and take the whole conversation into account.
    With an adapter that was trained on single questions, each question starts a new conversation;
    /continue turns this off.

    The model is loaded once. At first all adapters are active, stacked as for generate; /adapter
    NAME selects one. Ctrl-C stops an answer; at the prompt, it exits with code 130. A line that
    begins with / is a command; begin a message with // to send a slash. If stdin is not a terminal,
    each line is a message or a command, stdout contains only the answers, and notices go to stderr.

    In Python, this returns a context manager: `turn = chat.ask(text)`, then `chat.answer(turn,
    chat.active)` streams the answer, and `chat.keep` adds it to the conversation. `Chat.switch`
    takes the last parts of the adapters' paths as names, and `chat.continued = True` does the same
    as /continue. Each turn uses the next seed.

    Raises LorafoldError if the model or an adapter can't be loaded.

    Examples:
        lorafold chat
        lorafold chat demo/adapter
        lorafold chat demo/adapter --system "Answer in JSON." --temperature 0.7

    Notes:
        /adapter NAME: use one adapter; all: all of them; none: only the base; no name: list them.
        /both: the base model answers too, next to the adapter; repeat it to stop that.
        /system TEXT: set the system message; none removes it; no text: show it.
        /continue: keep the conversation with an adapter of single questions; repeat it to stop.
        /reset: forget the conversation (or /new); adapter and system message stay.
        /save FILE: append the conversation to FILE (.jsonl), as a row that lorafold train reads.
        /help: this list.
        /quit: exit, as Ctrl-D does.
    """
    from lorafold.api.arguments import as_paths
    from lorafold.api.model_arguments import load_with_adapters, resolve_base
    from lorafold.conversation import Chat, unique_names
    from lorafold.data.control_tokens import allow_tokens
    from lorafold.engine import Sampling

    paths = as_paths(adapters)
    base, saved = resolve_base(model, paths, console, **base_options)
    loaded, tokenizer = load_with_adapters(base, saved, console=console)
    if allow_control_tokens:
        allow_tokens(tokenizer)
    attached = (f"adapter{number}" for number in range(1, len(paths) + 1))  # names on the model
    names = unique_names(paths)
    return Chat(
        loaded,
        tokenizer,
        dict(zip(names, attached, strict=True)),
        single=[name for name, one in zip(names, saved, strict=True) if one.single_turn],
        system=system,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=temperature, seed=seed),
    )
