"""Verifies adapters: their files, their tokenizer, and that they fit the base.

First, worker processes that can be killed read the files and return digests
(`lorafold.verification`). Only then does this process parse the configuration and the record, and
a worker load the tokenizer, from bytes with these digests. Of adapters that differ only in the
values of tensors, only the first is checked against the base.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from lorafold.errors import EXITS, Busy, LorafoldError, error_location, is_transient, truncate
from lorafold.files.atomic import MANIFEST, write_text
from lorafold.files.contents import Contents, FileStamp
from lorafold.files.model_card import OVER, VOCABULARY
from lorafold.files.record import RECORD, TRAINED_ON, TURNS
from lorafold.identity import joined
from lorafold.methods import name_of
from lorafold.models.quantizations import ON_LOAD
from lorafold.models.tokenizer import CONFIG as SETTINGS
from lorafold.models.weights import Weights
from lorafold.peft.adapter_directory import FILES
from lorafold.peft.config import CONFIG, WEIGHTS, read_config
from lorafold.peft.form import DROPOUT
from lorafold.peft.provenance import RecordedBase, TrainingStorage, missing_message, parse_over
from lorafold.serving.backend import AdapterFiles, Backend
from lorafold.serving.directory import Directory
from lorafold.serving.rendering import Renderer, Renderers
from lorafold.serving.settings import Strict, read
from lorafold.verification.checks import Sandbox, VerifiedFiles

log = logging.getLogger(__name__)
MAX_BASE_ADAPTERS = 16
# fields of the record that affect loading
RECORD_FIELDS = ("base", OVER, DROPOUT, VOCABULARY, TRAINED_ON, TURNS)


class CachedAdapter(Strict):
    found: AdapterFiles
    marks: dict[str, FileStamp]


class CacheFile(Strict):
    identity: str
    adapters: dict[str, CachedAdapter] = Field({})


class VerifiedCache:
    """Verified adapters, stored between runs. An entry is valid while its files have the same
    stamps, for one base and one version of the code (`identity`). Loading compares digests in any
    case. Thread-safe.
    """

    def __init__(self, file: Path, identity: str) -> None:
        self.file, self.identity = file, identity
        self._saving, self._changed, self._failed = threading.Lock(), False, False
        self.adapters = dict[str, CachedAdapter]()  # entries without stamps are verified again
        self.digests: dict[str, str] = {}  # latest digests
        if os.path.lexists(file):
            try:
                content = read(file, CacheFile, "the file will be replaced")
            except LorafoldError as error:
                log.warning("all adapters are verified again: %s", error)
                return
            for name, cached in content.adapters.items():
                marks = cached.marks if content.identity == identity else {}
                self.digests[name] = cached.found.digest
                self.adapters[name] = CachedAdapter(found=cached.found, marks=marks)

    def put(self, adapter: AdapterFiles, marks: Mapping[str, FileStamp]) -> None:
        """Adds an adapter. Omits the stamps if a file was just written, because another write may
        not change its stamp.
        """
        settled = dict(marks) if all(mark.settled for mark in marks.values()) else {}
        self.adapters[adapter.name] = CachedAdapter(found=adapter, marks=settled)
        self._changed = True

    def save(self) -> None:
        with self._saving:  # so that older content can't overwrite newer content
            if not self._changed:
                return
            self._changed = False
            adapters = dict(self.adapters)  # a copy, because other threads add entries
            content = CacheFile(identity=self.identity, adapters=adapters)
            try:
                write_text(self.file, content.model_dump_json())
                self._failed = False
            except LorafoldError as error:
                if not self._failed:
                    log.warning("the cache of verified adapters can't be saved: %s", error)
                self._changed = self._failed = True


class Verifier:
    """Verifies the adapters of one server. `weights` are the base's weights if adapters of other
    bases are also served, and `storage` is the base's quantization. Thread-safe.
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
        """Returns a verified adapter. `afresh` ignores the cache. Raises only LorafoldError, if the
        adapter can't be served, or Busy, if resources are exhausted.
        """
        try:
            return self._find(name, afresh)
        except EXITS:
            raise
        except BaseException as error:  # a Rust panic is not an Exception
            if is_transient(error):
                raise Busy(f"{name} can't be verified now: {error}") from None
            if isinstance(error, LorafoldError):
                raise
            log.exception("%s can't be read", name)
            raise LorafoldError(f"the adapter can't be read ({error_location(error)})") from None

    def _find(self, name: str, afresh: bool) -> AdapterFiles:
        path, marks = self.directory.locate(name), dict[str, FileStamp]()
        cached = None if afresh else self.cache.adapters.get(name)
        if cached is not None and self._stamps(path, *cached.found.over) == cached.marks:
            return self._with_note(cached.found)
        adapter = self._read(name, path, marks)
        if afresh or adapter.form not in self._forms:
            self._backend.load(adapter, "checked")
            self._forms.add(adapter.form)
        self.cache.put(adapter, marks)
        return self._with_note(adapter)

    def renderer(self, adapter: AdapterFiles) -> Renderer:
        if adapter.words is None:
            return self._renderers.base
        if (renderer := self._renderers.by_digest.get(adapter.tokenizer)) is not None:
            return renderer
        files = self.directory.tokenizer(adapter.words)
        if files.named != adapter.tokenizer:
            raise LorafoldError(f"{adapter.name}: its tokenizer changed; load the adapter again")
        return self._renderers.of_files(files)

    def close(self) -> None:
        self._sandbox.close()
        self.cache.save()

    def _stamps(self, *paths: Path) -> dict[str, FileStamp]:
        return {name: mark for path in paths for name, mark in self.directory.stamps(path).items()}

    def _verified(self, path: Path, marks: dict[str, FileStamp]) -> VerifiedFiles:
        marks |= self._stamps(path)
        files = (*FILES, *self.directory.tokenizer_files(path))
        return self._sandbox.verify(path, files, CONFIG, RECORD, RECORD_FIELDS)

    def _read(self, name: str, path: Path, marks: dict[str, FileStamp]) -> AdapterFiles:
        """Verifies an adapter with its base adapters and tokenizer. Adds their files' stamps, taken
        before reading, to `marks`.
        """
        verified = self._verified(path, marks)
        files = (CONFIG, RECORD, MANIFEST)
        small = Contents(path, (CONFIG, RECORD), verified.bytes_of(files))
        if small.digest_of(files) != verified.digest_of(files):
            raise LorafoldError(f"{path}: changed while it was read; load the adapter again")
        config = small.object(CONFIG)
        if config.get("task_type") == "SEQ_CLS":
            raise LorafoldError(
                "found an adapter of a classifier or a reward model, expected one of a language"
                " model"
            )
        over = parse_over(small.record)
        if len(over) > MAX_BASE_ADAPTERS:
            message = f"found {len(over):,} base adapters, expected at most {MAX_BASE_ADAPTERS}"
            raise LorafoldError(f"{OVER}: {message}")
        below = [self.directory.base_adapter_path(origin, path) for origin in over]
        # base adapters are loaded with the adapter, so they must be verified too
        stack = {at: self._verified(at, marks) for at in below} | {path: verified}
        for at, origin in zip(below, over, strict=True):
            if stack[at].digest_of((CONFIG, WEIGHTS)) != origin.sha256:
                raise LorafoldError(missing_message(origin, path))
        spec = read_config(config)[0]
        ranked = getattr(spec, "over", spec)  # the spec that has the rank
        ranks = [getattr(ranked, "rank", 0), *getattr(ranked, "rank_pattern", {}).values()]
        # checked here, because loading allocates factors of this rank before it compares shapes
        rank = max((rank for rank in ranks if isinstance(rank, int)), default=0)
        if rank > verified.widest and ranked.rank_is_dimension:
            most = f"{verified.widest:,}, the largest dimension of the adapter's tensors"
            raise LorafoldError(f"rank: found {rank:,}, expected at most {most}")
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
            base=truncate(str(base or ""), 300), words=words,
            other_base=other_base, other_storage=other_storage,
            tokenizer="" if words is None else self._open_tokenizer(words, stack[words]),
            form=joined([files.form for files in each]),
            single_turn=small.record.get(TURNS) == 1,
        )  # fmt: skip
        hard_linked = self.directory.hard_linked
        linked = [n for at, files in stack.items() for n in hard_linked(at, files.files)]
        cached = self.cache.adapters.get(name)
        if linked and (cached is None or cached.found.digest != adapter.digest):
            raise LorafoldError(f"{linked[0]}: found several hard links, expected one; use a copy")
        return adapter

    def _differences(self, name: str, path: Path, files: Contents) -> tuple[str, str]:
        base, served = "", self._storage
        if self._weights is not None:
            recorded = RecordedBase.of(path, files.object(CONFIG), files.record)
            base = recorded.other_base_warning(self._weights)
        trained_on, storage = TrainingStorage.of(files.record), ""
        trained = trained_on.storage if trained_on else served
        if trained != served and {trained, served} & {*ON_LOAD}:
            trained = truncate(trained, 20)
            storage = f"trained on {trained} weights but served on {served} ones, so outputs differ"
            log.warning("%s: %s", name, storage)
        return truncate(base, 1000), storage

    def _open_tokenizer(self, path: Path, verified: VerifiedFiles) -> str:
        words = self.directory.tokenizer(path)
        if words.named != verified.digest_of(verified.files.keys() - {*FILES, MANIFEST}):
            raise LorafoldError(f"{path}: changed while it was read; load the adapter again")
        self._renderers.of_files(words)
        return words.named

    def _with_note(self, adapter: AdapterFiles) -> AdapterFiles:
        """Adds a note if the adapter was trained on another base or quantization, or names another
        base without its fingerprint.
        """
        base, note = adapter.base, adapter.other_base
        named, served_name = (Path(name.rstrip("/")).name.lower() for name in (base, self._base))
        if base and named != served_name:
            served = f"but it is served on {self._base!a}, which it fits"
            note = f"the adapter's config names the base {base[:200]!a}, {served}"
        notes = filter(None, (note, adapter.other_storage))
        return adapter.model_copy(update={"note": "; ".join(notes)})
