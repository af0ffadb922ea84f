"""The identity of a model or an adapter, as one digest of every file that can change an answer, by
name and content, and the identity of code: the sources of packages. Cards and the like don't count.
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
from lorafold.peft.adapter_directory import FILES, SavedAdapter
from lorafold.peft.config import CONFIG, no_adapter

WORDS = (*TOKENIZER_FILES, *VOCABULARIES)
CODE = "**/*.py"
ROOT = Path(__file__).parent
SOURCES = (".py", ".cpp", ".h")
# the packages that train a model or measure one, with all that they import
TRAINING = (
    *("adapter", "layers", "core", "data", "engine", "evaluation", "fold", "generation", "kernels"),
    *("runtime", "memory", "methods", "models", "objectives", "resolve", "ops", "peft", "recipe"),
    *("rewards", "training_step", "training"),
)
COMPUTED_WITH = ("torch", "transformers")


def of_model(source: ModelSource) -> str:
    """The SHA-256 over a model's configuration, weights and tokenizer, and its own Python files if
    they run, in hexadecimal; of an unpacked model over its GGUF files, since the bytes of the copy
    depend on the version of transformers.
    """
    if source.gguf is not None:
        return source.gguf.identity
    code = (CODE,) if source.trust_remote_code else ()
    files = files_digest(source.path, (*MODEL_FILES, *WORDS, *code))
    shards = model_files(source.intact(INDEX)) if (source.path / INDEX).is_file() else []
    elsewhere = _code_elsewhere(source.path) if source.trust_remote_code else []
    beside = (file_digest(shard)[1] for shard in shards if shard.parent != source.path)
    return joined([files, *beside, *elsewhere])


def _code_elsewhere(path: Path) -> list[str]:
    """The identities of the Python files of other repositories that a model's `auto_map` names, as
    "owner/name--module.Class", where the hub's cache has them: the folders of their modules.
    """
    folders = set[Path]()
    for name in ("config.json", "tokenizer_config.json"):
        text = (path / name).read_text(encoding="utf-8") if (path / name).is_file() else ""
        for repo, module in re.findall(r'"([\w.-]+/[\w.-]+)--([\w.]+)\.\w+"', text):
            at = try_to_load_from_cache(repo, f"{module.replace('.', '/')}.py")
            if isinstance(at, str):
                folders.add(Path(at).parent)
    return sorted(files_digest(folder, (CODE,)) for folder in folders)


def of_adapter(adapter: str | Path | SavedAdapter, words: bool = True) -> str:
    """The SHA-256 over an adapter's configuration, weights, record and tokenizer, in hexadecimal.
    """
    if isinstance(adapter, SavedAdapter):
        path, read = adapter.path, adapter.files
    else:
        path, read = Path(adapter), {}
    if not (path / CONFIG).is_file():
        raise no_adapter(path)
    return files_digest(path, (*FILES, *((*WORDS, CODE) if words else ())), read)


def joined(identities: Sequence[str]) -> str:
    """The SHA-256 over several identities in this order, in hexadecimal; one alone stays as it is.
    """
    if len(identities) == 1:
        return identities[0]
    return sha256("\n".join(identities).encode()).hexdigest()


@cache
def of_code(*rooms: str, packages: tuple[str, ...] = ()) -> str:
    """The SHA-256 over all sources in packages or modules of lorafold, and over the versions of
    installed packages, in hexadecimal.
    """
    digest = sha256()
    for room in sorted(rooms):
        path = ROOT / room
        files = sorted(path.rglob("*")) if path.is_dir() else [path.with_suffix(".py")]
        for file in files:
            if file.suffix in SOURCES:
                content = file.read_bytes()
                digest.update(f"{file.relative_to(ROOT).as_posix()} {len(content)}\n".encode())
                digest.update(content)
    for package in sorted(packages):
        digest.update(f"{package} {version(package)}\n".encode())
    return digest.hexdigest()
