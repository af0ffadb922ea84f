"""Whether an adapter may be served: its files, its tokenizer, and that it fits the base.

What comes with it is read in processes that can be ended (`lorafold.verification`), which name the
digests of all its files and of those of the adapters below it; only then are its configuration and
its record interpreted here, and its tokenizer opened, from bytes of these digests. Adapters that
differ in nothing but their values fit the base if one of them does.

`VerifiedCache` keeps what was found between runs, so that a start reads no adapter again. An entry
holds for as long as every file of the adapter, and of those below it, has the marks that it had
(`lorafold.files.digests`), for one base by its identity, whatever its name, and for the code that
verified it. Whoever reads an adapter compares its digest all the same.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from lorafold.core.spec import Spec
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
from lorafold.peft.config import CONFIG, WEIGHTS, read_config
from lorafold.peft.form import DROPOUT
from lorafold.peft.provenance import OwnBase, TrainedOn, not_found, parse
from lorafold.peft.saved import FILES
from lorafold.serving.backend import AdapterFiles, Backend
from lorafold.serving.directory import Directory
from lorafold.serving.rendering import Renderer, Renderers
from lorafold.serving.settings import Strict, read
from lorafold.verification.checks import Screen, VerifiedFiles

log = logging.getLogger(__name__)
OVERS = 16  # adapters below one
TOLD_MOST = 1000  # letters of how the bases differ
NAMED = 300  # letters of the base's name that are kept
# fields of the record that say how to read an adapter
TOLD = ("base", OVER, DROPOUT, VOCABULARY, TRAINED_ON)


class SeenAdapter(Strict):
    """An adapter, and the marks that its files had, and those of the adapters below."""

    found: AdapterFiles
    marks: dict[str, FileStamp]


class SeenFile(Strict):
    """The content of the file; `identity` is that of the base and of the code."""

    identity: str
    adapters: dict[str, SeenAdapter] = Field({})


class VerifiedCache:
    """The adapters that were verified. Any thread may call it."""

    def __init__(self, file: Path, identity: str) -> None:
        self.file, self.identity = file, identity
        self._lock, self._saving, self._changed = threading.Lock(), threading.Lock(), False
        self._failed = False
        self.adapters = dict[str, SeenAdapter]()  # without marks: it has to be verified again
        self.digests: dict[str, str] = {}  # that adapters had when they were last seen
        if os.path.lexists(file):
            try:
                content = read(file, SeenFile, "it is written anew")
            except LorafoldError as error:
                log.warning("adapters are verified again: %s", error)
                return
            self.digests = {name: one.found.digest for name, one in content.adapters.items()}
            for name, one in content.adapters.items():  # of another base the digest alone
                marks = one.marks if content.identity == identity else {}
                self.adapters[name] = SeenAdapter(found=one.found, marks=marks)

    def put(self, found: AdapterFiles, marks: Mapping[str, FileStamp]) -> None:
        """Note an adapter that was verified, without the marks of files that were written just now:
        they could be written again without another one, and so are read again.
        """
        noted = dict(marks) if all(mark.settled for mark in marks.values()) else {}
        with self._lock:
            self.adapters[found.name] = SeenAdapter(found=found, marks=noted)
            self._changed = True

    def save(self) -> None:
        """Write the file, if there is anything new."""
        with self._saving:  # an older content is not written over a newer one
            with self._lock:
                if not self._changed:
                    return
                self._changed = False
                content = SeenFile(identity=self.identity, adapters=dict(self.adapters))
            try:
                write_text(self.file, content.model_dump_json())
                self._failed = False
            except LorafoldError as error:
                if not self._failed:
                    log.warning("what was verified can't be kept yet: %s", error)
                self._changed = self._failed = True


class Verifier:
    """Verifies the adapters of one server. Any thread may call it."""

    def __init__(
        self, directory: Directory, screen: Screen, renderers: Renderers, seen: VerifiedCache,
        base: str, backend: Backend, weights: Weights | None = None, storage: str = "auto",
    ) -> None:  # fmt: skip
        self._weights, self._storage = weights, storage
        self.directory, self.seen, self._backend = directory, seen, backend
        self._screen, self._renderers, self._base = screen, renderers, base
        self._forms = {one.found.form for one in seen.adapters.values() if one.marks}

    def find(self, name: str, afresh: bool = False) -> AdapterFiles:
        """The adapter of a name, verified."""
        try:
            return self._found(name, afresh)
        except STOPS:
            raise
        except BaseException as error:  # a panic in a library is no Exception
            if passes(error):
                raise Busy(f"{name} can't be verified now: {error}") from None
            if isinstance(error, LorafoldError):
                raise
            log.exception("%s can't be read", name)
            raise LorafoldError(f"it can't be read ({place(error)})") from None

    def _found(self, name: str, afresh: bool) -> AdapterFiles:
        path, marks = self.directory.locate(name), dict[str, FileStamp]()
        known = None if afresh else self.seen.adapters.get(name)
        if known is not None and self._marks(path, *known.found.over) == known.marks:
            return self._noted(known.found)
        found = self._read(name, path, marks)
        if afresh or found.form not in self._forms:
            self._backend.load(found, "checked")
            self._forms.add(found.form)
        self.seen.put(found, marks)
        return self._noted(found)

    def renderer(self, found: AdapterFiles) -> Renderer:
        """What renders the adapter's requests."""
        if found.words is None:
            return self._renderers.base
        if (renderer := self._renderers.known.get(found.tokenizer)) is not None:
            return renderer
        files = self.directory.tokenizer(found.words)
        if files.named != found.tokenizer:
            raise LorafoldError(f"{found.name}: its tokenizer changed; load it again")
        return self._renderers.of(files)

    def close(self) -> None:
        """End the processes, and keep what was found."""
        self._screen.close()
        self.seen.save()

    def _marks(self, *paths: Path) -> dict[str, FileStamp]:
        return {name: mark for path in paths for name, mark in self.directory.marks(path).items()}

    def _verified(self, path: Path, marks: dict[str, FileStamp]) -> VerifiedFiles:
        marks |= self._marks(path)
        files = (*FILES, *self.directory.words(path))
        return self._screen.verify(path, files, CONFIG, RECORD, TOLD)

    def _read(self, name: str, path: Path, marks: dict[str, FileStamp]) -> AdapterFiles:
        """What an adapter says it is, from the bytes that were verified; adds the marks that its
        files had before, and those of the adapters below.
        """
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
        over = parse(small.record)
        if len(over) > OVERS:
            raise LorafoldError(f"{OVER}: found {len(over):,} adapters, expected at most {OVERS}")
        below = [self.directory.below(origin, path) for origin in over]
        # which are read with it, whatever became of them by themselves
        stack = {at: self._verified(at, marks) for at in below} | {path: verified}
        for at, origin in zip(below, over, strict=True):
            if stack[at].digest_of((CONFIG, WEIGHTS)) != origin.sha256:
                raise LorafoldError(not_found(origin, path))
        spec = read_config(config)[0]
        if (most := _largest_rank(spec)) > verified.widest and _inner(spec).rank_is_dimension:
            raise LorafoldError(f"r: found {most:,}, which no tensor of its file has")
        words = next((at for at in (path, *reversed(below)) if SETTINGS in stack[at].files), None)
        other = ""  # that it was trained on another base, where it is served all the same
        if self._weights is not None:
            other = OwnBase.of(path, small.object(CONFIG), small.record).other(self._weights)
        made_on, here, told = TrainedOn.of(small.record), self._storage, ""
        if made_on and made_on.storage != here and {made_on.storage, here} & {*MADE}:
            stored = cut(made_on.storage, 20)
            told = f"it was trained on {stored} weights: over {here} ones it is another model"
            log.warning("%s: %s", name, told)
        # each as `lorafold.identity.of_adapter` has it of the files
        each = [stack[at] for at in (*below, path)]
        identities = [one.digest_of(one.files.keys() - {MANIFEST}) for one in each]
        base = "" if "base" in small.record else config.get("base_model_name_or_path")
        found = AdapterFiles(
            name=name, path=path, digest=joined(identities),
            old=verified.digest_of((*FILES, MANIFEST)), manifest=MANIFEST in verified.files,
            over=tuple(below),
            stack=tuple(one.digest_of(FILES) for one in each),
            sizes=tuple(one.bytes_of(FILES) for one in each),
            method=name_of(spec), rank=getattr(_inner(spec), "rank", None),
            base=cut(str(base or ""), NAMED), words=words,
            other_base=cut(other, TOLD_MOST), other_storage=told,
            tokenizer="" if words is None else self._opened(words, stack[words]),
            form=joined([one.form for one in each]),
        )  # fmt: skip
        linked = [n for at, one in stack.items() for n in self.directory.linked(at, one.files)]
        before = self.seen.adapters.get(name)
        if linked and (before is None or before.found.digest != found.digest):
            raise LorafoldError(f"{linked[0]}: found more than one link, expected one; copy it")
        return found

    def _opened(self, path: Path, verified: VerifiedFiles) -> str:
        """The digest of an adapter's tokenizer, opened from the bytes that were verified."""
        words = self.directory.tokenizer(path)
        if words.named != verified.digest_of(verified.files.keys() - {*FILES, MANIFEST}):
            raise LorafoldError(f"{path} changes while it is read; load it again")
        self._renderers.of(words)
        return words.named

    def _noted(self, found: AdapterFiles) -> AdapterFiles:
        """With a line for an adapter that was trained on another base or quantization, or names
        another base and has no fingerprint to tell by.
        """
        theirs, ours = (Path(each.rstrip("/")).name.lower() for each in (found.base, self._base))
        told = f"it names the base {found.base[:200]!a}, and is served on {self._base!a}, which it"
        note = f"{told} fits" if found.base and theirs != ours else found.other_base
        notes = filter(None, (note, found.other_storage))
        return found.model_copy(update={"note": "; ".join(notes)})


def _inner(spec: Spec) -> Spec:
    """The method that has the rank, which another one may lie around."""
    inner: Spec = getattr(spec, "over", spec)
    return inner


def _largest_rank(spec: Spec) -> int:
    """The largest rank that a method may have at a module, 0 for one without. Whatever is larger
    than its tensors would be made before it is compared with them.
    """
    inner = _inner(spec)
    ranks = [getattr(inner, "rank", 0), *getattr(inner, "rank_pattern", {}).values()]
    return max((rank for rank in ranks if isinstance(rank, int)), default=0)
