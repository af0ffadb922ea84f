"""Whether an adapter may be served: its files, its tokenizer, and that it fits the base.

Its files, and those of the adapters below it, are read first in processes that can be killed
(`lorafold.verification`), which return their digests; only then are its configuration and record
interpreted here, and its tokenizer opened, from bytes of these digests. Adapters that differ in
nothing but their values fit the base if one of them does.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from lorafold.errors import STOPS, Busy, LorafoldError, cut, passes, place
from lorafold.files.atomic import MANIFEST, write_text
from lorafold.files.contents import Contents, FileStamp
from lorafold.files.model_card import OVER, VOCABULARY
from lorafold.files.record import RECORD, TRAINED_ON
from lorafold.identity import joined
from lorafold.methods import name_of
from lorafold.models.quantizations import MADE
from lorafold.models.tokenizer import CONFIG as SETTINGS
from lorafold.models.weights import Weights
from lorafold.peft.adapter_directory import FILES
from lorafold.peft.config import CONFIG, WEIGHTS, read_config
from lorafold.peft.form import DROPOUT
from lorafold.peft.provenance import OwnBase, TrainedOn, not_found, parse_over
from lorafold.serving.backend import AdapterFiles, Backend
from lorafold.serving.directory import Directory
from lorafold.serving.rendering import Renderer, Renderers
from lorafold.serving.settings import Strict, read
from lorafold.verification.checks import Sandbox, VerifiedFiles

log = logging.getLogger(__name__)
BELOW = 16  # adapters below one
# fields of the record that decide how an adapter is read
READ_BY = ("base", OVER, DROPOUT, VOCABULARY, TRAINED_ON)


class CachedAdapter(Strict):
    """An adapter, with the marks that its files had, and those of the adapters below."""

    found: AdapterFiles
    marks: dict[str, FileStamp]


class CacheFile(Strict):
    """The content of the file; `identity` is that of the base and of the code."""

    identity: str
    adapters: dict[str, CachedAdapter] = Field({})


class VerifiedCache:
    """The adapters that were verified, kept between runs. An entry holds as long as its files have
    the same marks, for one base and for the code that verified it (`identity`); whoever reads an
    adapter compares its digest all the same. Any thread may call it.
    """

    def __init__(self, file: Path, identity: str) -> None:
        self.file, self.identity = file, identity
        self._saving, self._changed, self._failed = threading.Lock(), False, False
        self.adapters = dict[str, CachedAdapter]()  # without marks: it has to be verified again
        self.digests: dict[str, str] = {}  # that adapters had when they were last seen
        if os.path.lexists(file):
            try:
                content = read(file, CacheFile, "it is written anew")
            except LorafoldError as error:
                log.warning("adapters are verified again: %s", error)
                return
            for name, cached in content.adapters.items():
                marks = cached.marks if content.identity == identity else {}
                self.digests[name] = cached.found.digest
                self.adapters[name] = CachedAdapter(found=cached.found, marks=marks)

    def put(self, adapter: AdapterFiles, marks: Mapping[str, FileStamp]) -> None:
        """Add an adapter; without marks, so that it is verified again, if a file was written just
        now: it could change again and keep its mark.
        """
        settled = dict(marks) if all(mark.settled for mark in marks.values()) else {}
        self.adapters[adapter.name] = CachedAdapter(found=adapter, marks=settled)
        self._changed = True

    def save(self) -> None:
        """Write the file, if anything changed."""
        with self._saving:  # no older content is written over a newer one
            if not self._changed:
                return
            self._changed = False
            adapters = dict(self.adapters)  # other threads add to it
            content = CacheFile(identity=self.identity, adapters=adapters)
            try:
                write_text(self.file, content.model_dump_json())
                self._failed = False
            except LorafoldError as error:
                if not self._failed:
                    log.warning("the record of verified adapters can't be written yet: %s", error)
                self._changed = self._failed = True


class Verifier:
    """Verifies the adapters of one server; `weights` are those of the base if adapters of other
    bases are served too, `storage` is its quantization. Any thread may call it.
    """

    def __init__(
        self, directory: Directory, sandbox: Sandbox, renderers: Renderers, cache: VerifiedCache,
        base: str, backend: Backend, weights: Weights | None = None, storage: str = "auto",
    ) -> None:  # fmt: skip
        self._weights, self._storage = weights, storage
        self.directory, self.cache, self._backend = directory, cache, backend
        self._sandbox, self._renderers, self._base = sandbox, renderers, base
        self._forms = {cached.found.form for cached in cache.adapters.values() if cached.marks}

    def find(self, name: str, afresh: bool = False) -> AdapterFiles:
        """The adapter of a name, verified; read again in any case if `afresh`. Raises LorafoldError
        if it can't be served, Busy if the machine lacks what that needs, and nothing else.
        """
        try:
            return self._find(name, afresh)
        except STOPS:
            raise
        except BaseException as error:  # a panic in a library is no Exception
            if passes(error):
                raise Busy(f"{name} can't be verified now: {error}") from None
            if isinstance(error, LorafoldError):
                raise
            log.exception("%s can't be read", name)
            raise LorafoldError(f"it can't be read ({place(error)})") from None

    def _find(self, name: str, afresh: bool) -> AdapterFiles:
        path, marks = self.directory.locate(name), dict[str, FileStamp]()
        cached = None if afresh else self.cache.adapters.get(name)
        if cached is not None and self._marks(path, *cached.found.over) == cached.marks:
            return self._with_note(cached.found)
        adapter = self._read(name, path, marks)
        if afresh or adapter.form not in self._forms:
            self._backend.load(adapter, "checked")
            self._forms.add(adapter.form)
        self.cache.put(adapter, marks)
        return self._with_note(adapter)

    def renderer(self, adapter: AdapterFiles) -> Renderer:
        """The renderer of an adapter's requests."""
        if adapter.words is None:
            return self._renderers.base
        if (renderer := self._renderers.known.get(adapter.tokenizer)) is not None:
            return renderer
        files = self.directory.tokenizer(adapter.words)
        if files.named != adapter.tokenizer:
            raise LorafoldError(f"{adapter.name}: its tokenizer changed; load it again")
        return self._renderers.of(files)

    def close(self) -> None:
        """End the processes, and save the cache."""
        self._sandbox.close()
        self.cache.save()

    def _marks(self, *paths: Path) -> dict[str, FileStamp]:
        return {name: mark for path in paths for name, mark in self.directory.marks(path).items()}

    def _verified(self, path: Path, marks: dict[str, FileStamp]) -> VerifiedFiles:
        marks |= self._marks(path)
        files = (*FILES, *self.directory.words(path))
        return self._sandbox.verify(path, files, CONFIG, RECORD, READ_BY)

    def _read(self, name: str, path: Path, marks: dict[str, FileStamp]) -> AdapterFiles:
        """Verify an adapter and read its record; adds the earlier marks of all its files."""
        verified = self._verified(path, marks)
        files = (CONFIG, RECORD, MANIFEST)
        small = Contents(path, (CONFIG, RECORD), verified.bytes_of(files))
        if small.digest_of(files) != verified.digest_of(files):
            raise LorafoldError(f"{path} changes while it is read; load it again")
        config = small.object(CONFIG)
        if config.get("task_type") == "SEQ_CLS":
            raise LorafoldError(
                "found an adapter of a classifier or a reward model, expected one of a language"
                " model"
            )
        over = parse_over(small.record)
        if len(over) > BELOW:
            raise LorafoldError(f"{OVER}: found {len(over):,} adapters, expected at most {BELOW}")
        below = [self.directory.below(origin, path) for origin in over]
        # they are read with it, so they are verified even if they were rejected by themselves
        stack = {at: self._verified(at, marks) for at in below} | {path: verified}
        for at, origin in zip(below, over, strict=True):
            if stack[at].digest_of((CONFIG, WEIGHTS)) != origin.sha256:
                raise LorafoldError(not_found(origin, path))
        spec = read_config(config)[0]
        ranked = getattr(spec, "over", spec)  # the method that has the rank
        ranks = [getattr(ranked, "rank", 0), *getattr(ranked, "rank_pattern", {}).values()]
        # factors of that rank would be made before they are compared with the file's tensors
        rank = max((rank for rank in ranks if isinstance(rank, int)), default=0)
        if rank > verified.widest and ranked.rank_is_dimension:
            raise LorafoldError(f"r: found {rank:,}, which no tensor of its file has")
        words = next((at for at in (path, *reversed(below)) if SETTINGS in stack[at].files), None)
        # in the order of `lorafold.identity.of_adapter`
        each = [stack[at] for at in (*below, path)]
        identities = [files.digest_of(files.files.keys() - {MANIFEST}) for files in each]
        base = "" if "base" in small.record else config.get("base_model_name_or_path")
        other_base, other_storage = self._differences(name, path, small)
        adapter = AdapterFiles(
            name=name, path=path, digest=joined(identities),
            old=verified.digest_of((*FILES, MANIFEST)), manifest=MANIFEST in verified.files,
            over=tuple(below),
            stack=tuple(files.digest_of(FILES) for files in each),
            sizes=tuple(files.bytes_of(FILES) for files in each),
            method=name_of(spec), rank=getattr(ranked, "rank", None),
            base=cut(str(base or ""), 300), words=words,
            other_base=other_base, other_storage=other_storage,
            tokenizer="" if words is None else self._open_tokenizer(words, stack[words]),
            form=joined([files.form for files in each]),
        )  # fmt: skip
        linked = [n for at, files in stack.items() for n in self.directory.linked(at, files.files)]
        cached = self.cache.adapters.get(name)
        if linked and (cached is None or cached.found.digest != adapter.digest):
            raise LorafoldError(f"{linked[0]}: found more than one link, expected one; copy it")
        return adapter

    def _differences(self, name: str, path: Path, files: Contents) -> tuple[str, str]:
        """How an adapter's base, and its quantization, differ from the served ones."""
        base, served = "", self._storage
        if self._weights is not None:
            base = OwnBase.of(path, files.object(CONFIG), files.record).other(self._weights)
        trained_on, storage = TrainedOn.of(files.record), ""
        if trained_on and trained_on.storage != served and {trained_on.storage, served} & {*MADE}:
            trained = cut(trained_on.storage, 20)
            storage = f"it was trained on {trained} weights: over {served} ones it is another model"
            log.warning("%s: %s", name, storage)
        return cut(base, 1000), storage

    def _open_tokenizer(self, path: Path, verified: VerifiedFiles) -> str:
        """Open an adapter's tokenizer from the bytes that were verified, and return its digest."""
        words = self.directory.tokenizer(path)
        if words.named != verified.digest_of(verified.files.keys() - {*FILES, MANIFEST}):
            raise LorafoldError(f"{path} changes while it is read; load it again")
        self._renderers.of(words)
        return words.named

    def _with_note(self, adapter: AdapterFiles) -> AdapterFiles:
        """The adapter with a note if it was trained on another base or quantization, or names
        another base and has no fingerprint of that.
        """
        base, note = adapter.base, adapter.other_base
        named, served_name = (Path(name.rstrip("/")).name.lower() for name in (base, self._base))
        if base and named != served_name:
            served = f"and is served on {self._base!a}, which it fits"
            note = f"it names the base {base[:200]!a}, {served}"
        notes = filter(None, (note, adapter.other_storage))
        return adapter.model_copy(update={"note": "; ".join(notes)})
