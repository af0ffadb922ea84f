"""What the server asks of what came with an adapter, or as the grammar of a request."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

from lorafold.errors import LorafoldError, cut
from lorafold.files.contents import Contents, digest
from lorafold.verification.adapter_tokenizer import Opened
from lorafold.verification.tokenizer_files import backend_of, write
from lorafold.verification.worker_pool import Refused, WorkerPool

# processes of each kind: two for what is verified in the background, one for what a request waits
# for
VERIFYING, RENDERING, COMPILING = 3, 3, 2
SECONDS = {"verify": 2.0, "open": 10.0, "render": 1.0, "tokens": 2.0, "compile": 2.0}
EACH = 5e-9  # seconds more for each byte of the weights
BYTES = {"verify": 512 << 20, "open": 2 << 30, "render": 512 << 20, "tokens": 512 << 20,
         "compile": 512 << 20}  # fmt: skip
VERDICTS = 4096  # grammars of which it is known whether they can be compiled


@dataclass(frozen=True)
class VerifiedFiles:
    """Files that were verified: (bytes, SHA-256 in hexadecimal) of each by name, the digest of what
    adapters have in common which differ in nothing but their values, and the largest dimension of a
    tensor.
    """

    files: Mapping[str, tuple[int, str]]
    form: str
    widest: int

    def digest_of(self, names: Iterable[str]) -> str:
        """The digest over those of these files that exist, as `Contents` has it."""
        return digest((name, *self.files[name]) for name in names if name in self.files)

    def bytes_of(self, names: Iterable[str]) -> int:
        """The bytes of those of these files that exist."""
        return sum(self.files[name][0] for name in names if name in self.files)


class Screen:
    """Asks processes, which it makes when they are needed. Any thread may call it."""

    def __init__(
        self, modules: Callable[[], Sequence[str]], tokenizer: Any, allow: bool = False,
        numbers: int | None = None,
    ) -> None:  # fmt: skip
        self._tokenizer, self._numbers = tokenizer, numbers
        self._verifying = WorkerPool(lambda: {"modules": list(modules())}, VERIFYING)
        self._rendering = WorkerPool(
            lambda: {"vocabulary": tokenizer.get_vocab(), "allow": allow}, RENDERING
        )
        self._compiling = WorkerPool(
            lambda: {
                "tokenizer": tokenizer.backend_tokenizer.to_str(), "end": tokenizer.eos_token_id,
            },
            COMPILING,
        )  # fmt: skip
        self._verdicts: OrderedDict[str, str] = OrderedDict()  # by digest, the oldest first
        self._copies = TemporaryDirectory(prefix="lorafold-tokenizers-")
        self.backend = backend_of(tokenizer)
        self._added = tokenizer.added_tokens_decoder  # made anew whenever it is asked for

    def verify(
        self, path: Path, files: Sequence[str], config: str, record: str, told: Sequence[str]
    ) -> VerifiedFiles:
        """What the files of an adapter are."""
        size = sum(f.stat().st_size for name in files if (f := path / name).is_file())
        found = self._verifying.call(
            "verify", (SECONDS["verify"] + EACH * size, BYTES["verify"] + 2 * size),
            path=str(path), files=list(files), config=config, record=record, told=list(told),
            numbers=self._numbers,
        )  # fmt: skip
        entries = {name: (size, sha256) for name, (size, sha256) in found["files"].items()}
        return VerifiedFiles(entries, found["form"], found["widest"])

    def open(self, contents: Contents) -> Opened | None:
        """The tokenizer of these files; None if it is the base's."""
        # a copy stays as it is whatever becomes of the adapter's files: a process reads it again
        # where another one died
        path = Path(self._copies.name) / contents.named
        write(contents, path)
        files = {"path": str(path), "names": list(contents.names), "digest": contents.named}
        call, base = partial(self._call, files), self._tokenizer
        try:
            about = call("open")
            same = (
                about["backend"] == self.backend != ""
                and about["template"] == base.chat_template
                and about["special"] == base.special_tokens_map
            )
            opened = None if same else Opened(about, base, self._added, call)
        except LorafoldError as error:
            rmtree(path, ignore_errors=True)
            raise LorafoldError(f"{contents.path}: its tokenizer: {error}") from None
        if opened is None:
            rmtree(path, ignore_errors=True)
        return opened

    def compile(self, grammar: str) -> None:
        """Raise LorafoldError for a grammar that can't be compiled within the limits of a process:
        whoever compiles it then can't be stopped. Each is compiled there once.
        """
        if not self.backend or self._tokenizer.eos_token_id is None:
            return  # the engine refuses every grammar
        known = sha256(grammar.encode("utf-8", "replace")).hexdigest()
        if (why := self._verdicts.get(known)) is None:
            seconds, memory = SECONDS["compile"], BYTES["compile"]
            try:
                why = str(self._compiling.call("compile", (seconds, memory), grammar=grammar))
            except Refused as error:
                if not (why := str(error) if error.kind else ""):
                    limits = f"{seconds:g} s, {memory >> 20} MiB of memory or the stack of a thread"
                    why = f"compiling it takes more than {limits}"
            self._verdicts[known] = why = cut(" ".join(why.split()), 300)
            if len(self._verdicts) > VERDICTS:
                self._verdicts.popitem(last=False)
        if why:
            raise LorafoldError(why)

    def close(self) -> None:
        """End the processes."""
        self._verifying.close()
        self._rendering.close()
        self._compiling.close()
        self._copies.cleanup()

    def _call(self, files: Mapping[str, Any], do: str, **arguments: Any) -> Any:
        limits = [(SECONDS[step], BYTES[step]) for step in dict.fromkeys(("open", do))]
        return self._rendering.call(do, *limits, files=files, **arguments)
