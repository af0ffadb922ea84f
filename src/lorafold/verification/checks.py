"""The sandbox: it checks adapter files, tokenizers and grammars in worker processes."""

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

from lorafold.errors import LorafoldError, truncate
from lorafold.files.contents import Contents, digest
from lorafold.verification.adapter_tokenizer import AdapterTokenizer
from lorafold.verification.tokenizer_files import backend_digest, write_files
from lorafold.verification.worker_pool import CheckFailed, WorkerPool

# worker processes; of the first two kinds, two are for background work and one is for requests
MAX_VERIFIERS, MAX_RENDERERS, MAX_COMPILERS = 3, 3, 2
CPU_SECONDS = {"verify": 2.0, "open": 10.0, "render": 1.0, "tokens": 2.0, "compile": 2.0}
SECONDS_PER_BYTE = 5e-9  # additional CPU seconds to verify a byte of the files
MEMORY_BYTES = dict.fromkeys(CPU_SECONDS, 512 << 20) | {"open": 2 << 30}
MAX_VERDICTS = 4096  # cached results of compiling grammars


@dataclass(frozen=True)
class VerifiedFiles:
    files: Mapping[str, tuple[int, str]]  # (bytes, SHA-256 in hexadecimal) by name
    form: str  # digest of the configuration, the tensors' header and the record's fields
    widest: int  # the largest dimension of a tensor

    def digest_of(self, names: Iterable[str]) -> str:
        return digest((name, *self.files[name]) for name in names if name in self.files)

    def bytes_of(self, names: Iterable[str]) -> int:
        return sum(self.files[name][0] for name in names if name in self.files)


class Sandbox:
    """Checks untrusted input for one base model, in worker processes that it starts on demand. With
    `allow`, messages may contain control tokens. Thread-safe.
    """

    def __init__(
        self, modules: Callable[[], Sequence[str]], tokenizer: Any, allow: bool = False,
        most_parameters: int | None = None,
    ) -> None:  # fmt: skip
        self._tokenizer, self._most_parameters = tokenizer, most_parameters
        self._verifying = WorkerPool(lambda: {"modules": list(modules())}, MAX_VERIFIERS)
        self._rendering = WorkerPool(
            lambda: {"vocabulary": tokenizer.get_vocab(), "allow": allow}, MAX_RENDERERS
        )
        self._compiling = WorkerPool(
            lambda: {
                "tokenizer": tokenizer.backend_tokenizer.to_str(), "end": tokenizer.eos_token_id,
            },
            MAX_COMPILERS,
        )  # fmt: skip
        self._verdicts: OrderedDict[str, str] = OrderedDict()  # errors or "", by digest
        self._copies = TemporaryDirectory(prefix="lorafold-tokenizers-")
        self.backend = backend_digest(tokenizer)
        self._added = tokenizer.added_tokens_decoder  # the property recomputes it on each access

    def verify(
        self, path: Path, files: Sequence[str], config: str, record: str, read_by: Sequence[str]
    ) -> VerifiedFiles:
        size = sum(f.stat().st_size for name in files if (f := path / name).is_file())
        verified = self._verifying.call(
            "verify",
            (CPU_SECONDS["verify"] + SECONDS_PER_BYTE * size, MEMORY_BYTES["verify"] + 2 * size),
            path=str(path), files=list(files), config=config, record=record, read_by=list(read_by),
            most_parameters=self._most_parameters,
        )  # fmt: skip
        entries = {name: (size, sha256) for name, (size, sha256) in verified["files"].items()}
        return VerifiedFiles(entries, verified["form"], verified["widest"])

    def open(self, contents: Contents) -> AdapterTokenizer | None:
        """The adapter's tokenizer, or None if it is the same as the base's."""
        # a copy, because a new worker must read the same files even if the originals have changed
        path = Path(self._copies.name) / contents.named
        write_files(contents, path)
        files = {"path": str(path), "names": list(contents.names), "digest": contents.named}
        call, base = partial(self._call, files), self._tokenizer
        try:
            about = call("open")
            same = (
                about["backend"] == self.backend != ""
                and about["template"] == base.chat_template
                and about["special"] == base.special_tokens_map
            )
            opened = None if same else AdapterTokenizer(about, base, self._added, call)
        except LorafoldError as error:
            rmtree(path, ignore_errors=True)
            raise LorafoldError(f"{contents.path}: tokenizer: {error}") from None
        if opened is None:
            rmtree(path, ignore_errors=True)
        return opened

    def compile(self, grammar: str) -> None:
        """Raises unless a worker can compile the llguidance grammar within its limits. The engine
        compiles it again and can't be interrupted, so only grammars that passed may reach it.
        """
        if not self.backend or self._tokenizer.eos_token_id is None:
            return  # the engine rejects every grammar
        key = sha256(grammar.encode("utf-8", "replace")).hexdigest()
        if (why := self._verdicts.get(key)) is None:
            seconds, memory = CPU_SECONDS["compile"], MEMORY_BYTES["compile"]
            try:
                why = str(self._compiling.call("compile", (seconds, memory), grammar=grammar))
            except CheckFailed as error:
                if not (why := str(error) if error.kind else ""):
                    limits = f"{seconds:g} s, {memory >> 20} MiB of memory or a thread's stack"
                    why = f"compiling the grammar takes more than {limits}"
            self._verdicts[key] = why = truncate(" ".join(why.split()), 300)
            if len(self._verdicts) > MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        if why:
            raise LorafoldError(why)

    def close(self) -> None:
        self._verifying.close()
        self._rendering.close()
        self._compiling.close()
        self._copies.cleanup()

    def _call(self, files: Mapping[str, Any], do: str, **arguments: Any) -> Any:
        limits = [(CPU_SECONDS[step], MEMORY_BYTES[step]) for step in dict.fromkeys(("open", do))]
        return self._rendering.call(do, *limits, files=files, **arguments)
