"""The terminal session of `lorafold chat`."""

import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING

import typer

from lorafold.api.chat import chat
from lorafold.api.options import Docs
from lorafold.errors import LorafoldError
from lorafold.files.terminal import print_lines

if TYPE_CHECKING:
    from rich.console import Console

    from lorafold.conversation import Chat, Turn

PROMPT = "> "
WITHOUT_ARGUMENT = {"/both", "/continue", "/reset", "/new", "/help", "/quit"}
AFRESH = (
    "the adapter was trained on single questions, so each question starts a new conversation;"
    " /continue keeps the conversation, /help lists the commands"
)


class Session:
    def __init__(self, chat: "Chat", console: "Console") -> None:
        self.chat, self.console, self.warned = chat, console, False
        self.commands = {
            "/adapter": self.adapter,
            "/both": self.both,
            "/system": self.system,
            "/continue": self.go_on,
            "/reset": self.reset,
            "/new": self.reset,
            "/save": self.save,
            "/help": self.help,
        }

    def run(self, lines: Iterator[str]) -> None:
        for line in lines:
            text = line.strip()
            if text == "/quit":
                return
            try:
                if text.startswith("/") and not text.startswith("//"):
                    self.obey(*text.split(maxsplit=1))
                elif text:
                    self.answer(text[text.startswith("//") :])
            except LorafoldError as error:
                self.notify(f"error: {error}")

    def notify(self, text: str) -> None:
        print_lines(self.console, text)

    def answer(self, text: str) -> None:
        from lorafold.conversation import label
        from lorafold.data.control_tokens import PROMPT_REMARK, is_marked

        turn, speakers = self.chat.ask(text), self.chat.speakers()
        if is_marked(turn.prompt) and not self.warned:
            self.warned = True
            self.notify(PROMPT_REMARK)
        if turn.dropped:
            self.notify(
                f"the conversation leaves too little of the model's context ({self.chat.context}"
                f" tokens) for an answer: the model no longer sees the oldest"
                f" {f'{turn.dropped} turns' if turn.dropped > 1 else 'turn'}"
            )
        for names in speakers:
            if len(speakers) > 1:
                typer.echo(f"[{label(names)}] ", nl=False)
            answer, stopped = self.one_answer(turn, names)
        if answer or not stopped:
            self.chat.keep(turn, answer)

    def one_answer(self, turn: "Turn", names: tuple[str, ...]) -> tuple[str, bool]:
        pieces = []
        with _stoppable() as stop:
            with closing(self.chat.answer(turn, names)) as answer:
                for piece in answer:
                    pieces.append(piece)
                    typer.echo(piece, nl=False)
                    if stop:
                        break
            typer.echo()
            if stop:
                self.notify("(stopped)")
            elif len(pieces) >= turn.room:
                self.notify(f"(stopped at the limit of {turn.room} tokens)")
        return "".join(pieces), bool(stop)

    def obey(self, name: str, argument: str = "") -> None:
        if name not in self.commands and name not in WITHOUT_ARGUMENT:
            raise LorafoldError(
                f"unknown command {name}; /help lists the commands, and // begins a message with /"
            )
        if argument and name in WITHOUT_ARGUMENT:
            raise LorafoldError(f"{name}: found {argument!r}, expected no argument")
        self.commands[name](argument)

    def adapter(self, name: str) -> None:
        if name:
            self.chat.switch(name)
            return self.answering()
        for known in self.chat.adapters:
            self.notify(f"{'*' if known in self.chat.active else ' '} {known}")
        self.notify(f"{' ' if self.chat.active else '*'} none (only the base model)")

    def answering(self) -> None:
        from lorafold.conversation import label

        self.notify(f"answering: {label(self.chat.active)}")
        if self.chat.afresh:
            self.notify(AFRESH)

    def both(self, _: str) -> None:
        if not self.chat.active:
            raise LorafoldError("/both: no adapter is active; choose one with /adapter NAME")
        self.chat.both = not self.chat.both
        self.notify(f"the base model answers too: {'on' if self.chat.both else 'off'}")

    def system(self, text: str) -> None:
        if text:
            self.chat.system = None if text == "none" else text
        self.notify(f"system message: {self.chat.system or 'not set'}")

    def go_on(self, _: str) -> None:
        self.chat.continued = not self.chat.continued
        self.notify(AFRESH if self.chat.afresh else "the conversation continues")

    def reset(self, _: str) -> None:
        self.chat.reset()
        self.notify("the conversation was reset")

    def save(self, path: str) -> None:
        if not path:
            raise LorafoldError("/save: expected a file name, as in /save talks.jsonl")
        rows = self.chat.save(path)
        self.notify(f"saved to {path} (rows in the file: {rows})")

    def help(self, _: str) -> None:
        lines = [line.rstrip(".").split(": ", 1) for line in Docs.of(chat).notes.splitlines()]
        width = max(len(name) for name, _ in lines)
        for name, text in lines:
            self.notify(f"{name:<{width}}  {text}")


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Collects Ctrl-C in a list instead of raising KeyboardInterrupt, so that no forward pass is
    interrupted and a second Ctrl-C does not end the conversation.
    """
    stop = []
    before = signal.signal(signal.SIGINT, lambda number, frame: stop.append(number))
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def read_typed(console: "Console") -> Iterator[str]:
    """Yields lines from a terminal until Ctrl-D. If stdout is a file, the prompt goes to stderr."""
    with suppress(ImportError):
        import readline  # noqa: F401  (input() edits lines with it from here on)
    console.print(f"{PROMPT}/help lists the commands; Ctrl-D exits", highlight=False)
    prompt = PROMPT if sys.stdout.isatty() else ""
    while True:
        if not prompt:
            console.print(PROMPT, end="")
        try:
            line = input(prompt)
            line.encode()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print()
            raise
        except UnicodeError:
            console.print("error: the line is not valid UTF-8 and was not sent")
            continue
        yield line


def read_piped() -> Iterator[str]:
    """Yields lines from a pipe or file. A line that is not UTF-8 ends the conversation."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise LorafoldError(f"stdin: line {number} is not valid UTF-8") from error
