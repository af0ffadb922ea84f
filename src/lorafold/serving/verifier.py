"""Whether an adapter may be served: its files, its tokenizer, and that it fits the base.

What comes with it is read in processes that can be ended (`lorafold.screening`); only then are its
configuration and its record interpreted here, from bytes of the digest that was verified there.
Adapters that differ in nothing but their values fit the base if one of them does. What was found is
kept for as long as no file is touched.
"""

from __future__ import annotations

import logging
from pathlib import Path

from lorafold.core.spec import Spec
from lorafold.engine import Engine
from lorafold.engine.adapters import Entry as Files
from lorafold.errors import STOPS, LorafoldError, cut, place
from lorafold.files.atomic import MANIFEST
from lorafold.files.card import OVER, VOCABULARY
from lorafold.files.contents import Contents
from lorafold.files.record import RECORD
from lorafold.peft.config import CONFIG, read_config
from lorafold.peft.directory import FILES
from lorafold.peft.form import DROPOUT
from lorafold.peft.stack import parse
from lorafold.screening.screen import Screen, Verified
from lorafold.serving.directory import Directory
from lorafold.serving.renderers import Renderers
from lorafold.serving.rendering import Renderer
from lorafold.serving.seen import Found, Seen
from lorafold.translating.peft_config import name_of

log = logging.getLogger(__name__)
OVERS = 16  # adapters below one
NAMED = 300  # letters of the base's name that are kept
TOLD = ("base", OVER, DROPOUT, VOCABULARY)  # fields of the record that say how to read an adapter


class Verifier:
    """Verifies the adapters of one server. Any thread may call it.

    Args:
        directory: the adapters.
        screen: reads what came with them.
        renderers: opens their tokenizers.
        seen: what was verified before.
        base: the name of the base.
    """

    def __init__(
        self, directory: Directory, screen: Screen, renderers: Renderers, seen: Seen, base: str
    ) -> None:
        self.directory, self.seen = directory, seen
        self._screen, self._renderers, self._base = screen, renderers, base
        self._forms = seen.forms()

    def find(self, name: str, engine: Engine, afresh: bool = False) -> Found:
        """The adapter of a name, verified. Raises LorafoldError for one that can't be served, and
        nothing else, whatever reading it raises.

        Args:
            name: its name.
            engine: what it has to fit.
            afresh: read it even if nothing was touched since it was read last.
        """
        try:
            return self._found(name, engine, afresh)
        except (LorafoldError, *STOPS):
            raise
        except BaseException as error:  # a panic in a library is no Exception
            log.exception("%s can't be read", name)
            raise LorafoldError(f"it can't be read ({place(error)})") from None

    def _found(self, name: str, engine: Engine, afresh: bool) -> Found:
        marks = self.directory.marks(name)
        known = None if afresh else self.seen.find(name, marks)
        if known is not None:
            return known
        path = self.directory.locate(name)
        verified = self._verified(path)
        found = self._read(name, path, verified)
        if afresh or found.form not in self._forms:
            engine.verify(Files(found.key, path, found.digest, 0))
            self._forms.add(found.form)
        self.seen.put(found, marks)
        return found

    def renderer(self, found: Found) -> Renderer:
        """What renders the adapter's requests. Raises LorafoldError if its tokenizer is another one
        by now.
        """
        if not found.tokenizer:
            return self._renderers.base
        if (renderer := self._renderers.known(found.tokenizer)) is not None:
            return renderer
        files = self.directory.tokenizer(found.name)
        if files is None or files.named != found.tokenizer:
            raise LorafoldError(f"{found.name}: its tokenizer changed; load it again")
        return self._renderers.of(files)

    def close(self) -> None:
        """End the processes, and keep what was found."""
        self._screen.close()
        self.seen.save()

    def _verified(self, path: Path) -> Verified:
        return self._screen.verify(path, FILES, CONFIG, RECORD, TOLD)

    def _read(self, name: str, path: Path, verified: Verified) -> Found:
        """What an adapter says it is, from the bytes that were verified."""
        small = Contents(path, (CONFIG, RECORD))
        files = (CONFIG, RECORD, MANIFEST)
        if any(verified.digests.get(file) != small.digests.get(file) for file in files):
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
        for origin in over:  # which are read with it, whatever became of them by themselves
            if self._verified(self.directory.below(origin, path)).below != origin.sha256:
                raise LorafoldError(f"{origin.path} changes while it is read; load it again")
        spec = read_config(config)[0]
        if (most := _largest_rank(spec)) > verified.widest and _inner(spec).rank_is_dimension:
            raise LorafoldError(f"r: found {most:,}, which no tensor of its file has")
        own = self.directory.tokenizer(name)
        if own is not None:
            self._renderers.of(own)
        base = cut(str(config.get("base_model_name_or_path") or ""), NAMED)
        return Found(
            name=name, path=path, digest=verified.digest, method=name_of(spec),
            rank=getattr(_inner(spec), "rank", None),
            base=base, form=verified.form, tokenizer="" if own is None else own.named,
            note="" if "base" in small.record else self._note(base),
        )  # fmt: skip

    def _note(self, base: str) -> str:
        """A line for an adapter that names another base, and has no fingerprint to tell by."""
        theirs, ours = (Path(each.rstrip("/")).name.lower() for each in (base, self._base))
        if not base or theirs == ours:
            return ""
        return f"it names the base {base[:200]!a}, and is served on {self._base!a}, which it fits"


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
