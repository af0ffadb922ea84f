"""`lorafold chat`: a conversation in the terminal, with the base and its adapters."""

import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

import typer

from lorafold.api.chat import chat
from lorafold.api.options import Docs
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from rich.console import Console

    from lorafold.conversation import Chat, Turn

PROMPT = "> "
ALONE = {"/both", "/reset", "/new", "/help", "/quit"}  # nothing comes after these


class Session:
    """Lines in, answers and notices out."""

    def __init__(self, chat: "Chat", console: "Console") -> None:
        self.chat, self.console, self.told = chat, console, False
        self.commands = {
            "/adapter": self.adapter,
            "/both": self.both,
            "/system": self.system,
            "/reset": self.reset,
            "/new": self.reset,
            "/save": self.save,
            "/help": self.help,
        }

    def run(self, lines: Iterator[str]) -> None:
        """Answer or obey each line until there are no more, or one says /quit."""
        for line in lines:
            text = line.strip()
            if text == "/quit":
                return
            try:
                if text.startswith("/") and not text.startswith("//"):
                    name, *rest = text.split(maxsplit=1)
                    self.obey(name, "".join(rest))
                elif text:
                    self.answer(text.removeprefix("/") if text.startswith("//") else text)
            except LorafoldError as error:
                self.tell(f"error: {error}")

    def tell(self, text: str) -> None:
        """Print a notice to stderr."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def answer(self, text: str) -> None:
        """Print each speaker's answer as it comes, and keep the last one's."""
        from lorafold.conversation import label
        from lorafold.data.control_tokens import IN_PROMPT, is_marked

        turn, speakers = self.chat.ask(text), self.chat.speakers()
        if is_marked(turn.prompt) and not self.told:
            self.told = True
            self.tell(IN_PROMPT)
        if turn.dropped:
            self.tell(
                f"the conversation is longer than the model's context of {self.chat.context}"
                f" tokens: the model no longer sees its oldest"
                f" {f'{turn.dropped} turns' if turn.dropped > 1 else 'turn'}"
            )
        for names in speakers:
            if len(speakers) > 1:
                typer.echo(f"[{label(names)}] ", nl=False)
            said, stopped = self.one_answer(turn, names)
        if said or not stopped:
            self.chat.keep(turn, said)

    def one_answer(self, turn: "Turn", names: tuple[str, ...]) -> tuple[str, bool]:
        """The answer, printed as it comes, and whether Ctrl-C stopped it."""
        pieces: list[str] = []
        with _stoppable() as stop:
            with closing(self.chat.answer(turn, names)) as answer:
                for piece in answer:
                    pieces.append(piece)
                    typer.echo(piece, nl=False)
                    if stop.asked:
                        break
            typer.echo()
            if stop.asked:
                self.tell("(stopped)")
            elif len(pieces) >= turn.room:
                self.tell(f"(cut after {turn.room} tokens)")
        return "".join(pieces), stop.asked

    def obey(self, name: str, rest: str) -> None:
        """Carry out a command. LorafoldError for an unknown one, or for words it does not take."""
        if name not in self.commands and name not in ALONE:
            raise LorafoldError(
                f"no command {name}; /help lists them, and // begins a message with a slash"
            )
        if rest and name in ALONE:
            raise LorafoldError(f"{name}: found {rest!r} after it, expected nothing")
        self.commands[name](rest)

    def adapter(self, name: str) -> None:
        """Switch to an adapter, or list them where no name is given."""
        if name:
            self.chat.switch(name)
            self.answering()
        else:
            for own in self.chat.adapters:
                self.tell(f"{'*' if own in self.chat.active else ' '} {own}")
            self.tell(f"{' ' if self.chat.active else '*'} none (the bare base)")

    def answering(self) -> None:
        """Say which adapters are active."""
        from lorafold.conversation import label

        self.tell(f"answering: {label(self.chat.active)}")

    def both(self, _: str) -> None:
        """Switch whether the base answers too. LorafoldError where no adapter is active."""
        if not self.chat.active:
            raise LorafoldError("/both: no adapter is active, so there is only the base to answer")
        self.chat.both = not self.chat.both
        self.tell(f"the base beside the adapter: {'on' if self.chat.both else 'off'}")

    def system(self, text: str) -> None:
        """Set the system message, take it away (none), or say what it is."""
        if text:
            self.chat.system = None if text == "none" else text
        self.tell(f"system message: {self.chat.system or 'none of yours'}")

    def reset(self, _: str) -> None:
        """Forget the conversation."""
        self.chat.reset()
        self.tell("the conversation is forgotten")

    def save(self, path: str) -> None:
        """Append the conversation to a file. LorafoldError without a file name."""
        if not path:
            raise LorafoldError("/save: expected a file after it, as in /save talks.jsonl")
        rows = self.chat.save(path)
        self.tell(f"{path}: {rows} {'conversations' if rows > 1 else 'conversation'}")

    def help(self, _: str) -> None:
        """List the commands."""
        lines = [line.rstrip(".").split(": ", 1) for line in Docs.of(chat).notes.splitlines()]
        width = max(len(name) for name, _ in lines)
        for name, text in lines:
            self.tell(f"{name:<{width}}  {text}")


class _Stop:
    asked = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


@contextmanager
def _stoppable() -> Iterator[_Stop]:
    """Within it Ctrl-C only asks, however often it is pressed: the model is never left halfway
    through a step, and an impatient second one does not end the conversation.
    """
    stop = _Stop()
    before = signal.signal(signal.SIGINT, stop.ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def typed(console: "Console") -> Iterator[str]:
    """Lines from a terminal, with line editing, until Ctrl-D. Where stdout is a file, the prompt
    goes to stderr.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  (input() edits lines with it from here on)
    console.print(f"{PROMPT}/help lists the commands; Ctrl-D ends", highlight=False)
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
            console.print("error: that line is not UTF-8; it was not sent")
            continue
        yield line


def piped() -> Iterator[str]:
    """Lines from a pipe or a file, each as soon as it is there.

    LorafoldError, which ends the conversation, for one that is not UTF-8.
    """
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise LorafoldError(f"stdin: line {number} is not UTF-8") from error
