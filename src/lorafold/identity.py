"""Digests of all files of a model or an adapter that affect its outputs, and of lorafold's source
code.
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
from lorafold.peft.config import CONFIG, missing_config_error

WORDS = (*TOKENIZER_FILES, *VOCABULARIES)
CODE = "**/*.py"
ROOT = Path(__file__).parent
SOURCES = (".py", ".cpp", ".h", ".yaml", ".jinja")
# the packages that training and evaluation import
TRAINING = (
    *("adapter", "layers", "core", "data", "engine", "evaluation", "fold", "generation", "kernels"),
    *("runtime", "memory", "methods", "models", "objectives", "resolve", "ops", "peft", "recipe"),
    *("rewards", "training_step", "training"),
)
COMPUTED_WITH = ("torch", "transformers")


def of_model(source: ModelSource) -> str:
    """Hashes a model's configuration, weights and tokenizer, and its Python files if they are
    executed. For a model converted from GGUF, hashes the GGUF files instead, because the bytes of
    the converted copy depend on the version of transformers.
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
    """Hashes the cached Python files of other repositories, which `auto_map` names as
    "owner/name--module.Class".
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
    """Hashes an adapter's configuration, weights and record and, with `words`, its tokenizer and
    Python files.
    """
    if isinstance(adapter, SavedAdapter):
        path, read = adapter.path, adapter.files
    else:
        path, read = Path(adapter), {}
    if not (path / CONFIG).is_file():
        raise missing_config_error(path)
    return files_digest(path, (*FILES, *((*WORDS, CODE) if words else ())), read)


def joined(identities: Sequence[str]) -> str:
    """Hashes several digests in order; a single digest is returned unchanged."""
    if len(identities) == 1:
        return identities[0]
    return sha256("\n".join(identities).encode()).hexdigest()


@cache
def of_code(*rooms: str, packages: tuple[str, ...] = ()) -> str:
    """Hashes the source files of lorafold's packages or modules `rooms`, and the versions of
    installed `packages`.
    """
    digest = sha256()
    for room in sorted(rooms):
        path = ROOT / room
        files = path.rglob("*") if path.is_dir() else path.parent.glob(f"{path.name}.*")
        for file in sorted(files):
            if file.suffix in SOURCES:
                content = file.read_bytes()
                digest.update(f"{file.relative_to(ROOT).as_posix()} {len(content)}\n".encode())
                digest.update(content)
    for package in sorted(packages):
        digest.update(f"{package} {version(package)}\n".encode())
    return digest.hexdigest()
