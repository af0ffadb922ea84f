"""The identity of a model, of an adapter and of a stack, as one digest: every file that can change
an answer; and that of code: the sources of the rooms that make a thing, and of the packages below.

Files count by name and content, and neither where they are nor how they came there. What only tells
of a thing, such as a card, is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from lorafold.files.contents import file_digest, files_digest
from lorafold.models.sources import ModelSource
from lorafold.models.tokenizer import TOKENIZER_FILES, VOCABULARIES
from lorafold.models.weights import INDEX, MODEL_FILES, model_files
from lorafold.peft.config import CONFIG, no_adapter
from lorafold.peft.saved import FILES, Saved

WORDS = (*TOKENIZER_FILES, *VOCABULARIES)
CODE = "**/*.py"
ROOT = Path(__file__).parent
SOURCES = (".py", ".cpp", ".h")
# The rooms that train a model or measure one, with all that they import.
TRAINING = (
    *("adapter", "layers", "core", "data", "engine", "evaluation", "fold", "generation", "kernels"),
    *("runtime", "memory", "methods", "models", "objectives", "resolve", "ops", "peft", "recipe"),
    *("rewards", "training_step", "training"),
)
COMPUTED_WITH = ("torch", "transformers")


def of_model(source: ModelSource) -> str:
    """The SHA-256 over a model's configuration, weights and tokenizer, and its own Python files if
    they run, in hexadecimal; of one that was unpacked, over its GGUF files, since
    transformers writes their copy in other bytes by version.
    """
    if source.gguf is not None:
        return source.gguf.identity
    own = (CODE,) if source.trust_remote_code else ()
    here = files_digest(source.path, (*MODEL_FILES, *WORDS, *own))
    indexed = model_files(source.intact(INDEX)) if (source.path / INDEX).is_file() else []
    beside = _code_elsewhere(source.path) if source.trust_remote_code else []
    return joined([here, *(file_digest(f)[1] for f in indexed if f.parent != source.path), *beside])


def _code_elsewhere(path: Path) -> list[str]:
    """The identities of the Python files of other repositories that a model's `auto_map` names, as
    "owner/name--module.Class", where the hub's cache has them: the folders of their modules.
    """
    found = set[Path]()
    for name in ("config.json", "tokenizer_config.json"):
        text = (path / name).read_text(encoding="utf-8") if (path / name).is_file() else ""
        for repo, module in re.findall(r'"([\w.-]+/[\w.-]+)--([\w.]+)\.\w+"', text):
            at = try_to_load_from_cache(repo, f"{module.replace('.', '/')}.py")
            if isinstance(at, str):
                found.add(Path(at).parent)
    return sorted(files_digest(folder, (CODE,)) for folder in found)


def of_adapter(adapter: str | Path | Saved, words: bool = True) -> str:
    """The SHA-256 over an adapter's configuration, weights, record and tokenizer, in hexadecimal.
    Raises LorafoldError where there is no adapter.

    Args:
        adapter: The directory, or what was read of it.
        words: Count its tokenizer and that one's code, which not everything reads that reads an
            adapter.
    """
    if isinstance(adapter, Saved):
        path, read = adapter.path, adapter.files
    else:
        path, read = Path(adapter), {}
    if not (path / CONFIG).is_file():
        raise no_adapter(path)
    return files_digest(path, (*FILES, *((*WORDS, CODE) if words else ())), read)


def of_stack(base: str, adapters: Sequence[str | Path]) -> str:
    """The SHA-256 over a base and the adapters over it, in this order, in hexadecimal.

    Args:
        base: The base's identity.
        adapters: The directories, lowest first.
    """
    return joined([base, *map(of_adapter, adapters)])


def joined(identities: Sequence[str]) -> str:
    """The SHA-256 over several identities in this order, in hexadecimal; one alone stays as it is.
    """
    if len(identities) == 1:
        return identities[0]
    return sha256("\n".join(identities).encode()).hexdigest()


@cache
def of_code(*rooms: str, packages: tuple[str, ...] = ()) -> str:
    """The SHA-256 of everything that is computed with: all sources in these rooms, in hexadecimal.

    Args:
        *rooms: packages or modules of lorafold, such as `data`.
        packages: installed packages whose version matters, such as `torch`.
    """
    found = sha256()
    for room in sorted(rooms):
        there = ROOT / room
        files = sorted(there.rglob("*")) if there.is_dir() else [there.with_suffix(".py")]
        for file in files:
            if file.suffix in SOURCES:
                content = file.read_bytes()
                found.update(f"{file.relative_to(ROOT).as_posix()} {len(content)}\n".encode())
                found.update(content)
    for package in sorted(packages):
        found.update(f"{package} {version(package)}\n".encode())
    return found.hexdigest()
