"""What the server asks of what came with an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorafold.errors import LorafoldError
from lorafold.files.contents import Contents
from lorafold.screening.fingerprints import backend_of
from lorafold.screening.opened import Opened
from lorafold.screening.processes import Processes, Refused

# processes; two verify in the background, and one what a request waits for
VERIFYING, RENDERING = 3, 2
SECONDS = {"verify": 5.0, "open": 10.0, "render": 1.0, "tokens": 2.0}
EACH = 5e-9  # seconds more for each byte of the weights
BYTES = {"verify": 512 << 20, "open": 2 << 30, "render": 512 << 20, "tokens": 512 << 20}


@dataclass(frozen=True)
class Verified:
    """Files that were verified: their digest, that of each, and that of what adapters have in
    common which differ in nothing but their values.
    """

    digest: str
    digests: Mapping[str, str]
    form: str


class Screen:
    """Asks processes, which it makes when they are needed. Any thread may call it.

    Args:
        modules: gives the paths of the base's modules.
        tokenizer: the base's.
    """

    def __init__(self, modules: Callable[[], Sequence[str]], tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._verifying = Processes(lambda: {"modules": list(modules())}, VERIFYING)
        self._rendering = Processes(lambda: {"vocabulary": tokenizer.get_vocab()}, RENDERING)
        self.backend = backend_of(tokenizer)

    def verify(
        self, path: Path, files: Sequence[str], config: str, record: str, told: Sequence[str]
    ) -> Verified:
        """What the files of an adapter are. Raises LorafoldError for those that are wrong.

        Args:
            path: its directory.
            files: its files.
            config, record: the two of them that are JSON.
            told: the fields of the record that say how to read the rest.
        """
        size = sum(f.stat().st_size for name in files if (f := path / name).is_file())
        found = self._verifying.call(
            "verify", SECONDS["verify"] + EACH * size, BYTES["verify"] + 2 * size,
            path=str(path), files=list(files), config=config, record=record, told=list(told),
        )  # fmt: skip
        return Verified(**found)

    def open(self, contents: Contents) -> Opened | None:
        """The tokenizer of these files; None if it is the base's. Raises LorafoldError for one that
        can't be read or used.
        """
        own = {"path": str(contents.path), "files": list(contents.names), "digest": contents.digest}
        call = partial(self._call, own)
        try:
            about = call("open")
        except Refused as error:
            raise LorafoldError(f"{contents.path}: its tokenizer: {error}") from None
        base = self._tokenizer
        if (
            about["backend"] == self.backend != ""
            and about["template"] == base.chat_template
            and about["special"] == base.special_tokens_map
        ):
            return None
        return Opened(about, base, call)

    def close(self) -> None:
        """End the processes."""
        self._verifying.close()
        self._rendering.close()

    def _call(self, own: Mapping[str, Any], do: str, **arguments: Any) -> Any:
        return self._rendering.call(do, SECONDS[do], BYTES[do], **own, **arguments)
