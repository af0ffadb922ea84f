"""A base model and its tokenizer, read from the directory that `models.sources` finds for a name:
on a device (`machine.devices`), in a storage (`models.storage`), complete and as it was written.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafold.errors import LorafoldError, NoTokenizer
from lorafold.models.load_errors import loading
from lorafold.models.quantizing import compute_in, read_quantized
from lorafold.models.sources import ModelSource, resolved
from lorafold.models.storage import Storage, held_as
from lorafold.models.weights import MODEL_FILES

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# what a tokenizer is read from, but for vocabularies that its class alone has names for
TOKENIZER_FILES = (
    "added_tokens.json",
    "additional_chat_templates/*",
    "chat_template.*",
    "config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
# one of these holds the words, unless a tokenizer needs none
VOCABULARIES = (
    *("tokenizer.json", "tokenizer.*.json", "tekken.json", "*.model", "*.tiktoken", "*.spm"),
    *("*.bpe", "vocab*", "merges.txt"),
)


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
    source = resolved(source, revision)
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
    source = resolved(source, revision)
    return read_tokenizer(source, f"model {source.name}", trust_remote_code)


def read_tokenizer(
    source: ModelSource, what: str, trust_remote_code: bool
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a directory, called `what` in messages.

    Where there is no vocabulary, transformers makes an empty tokenizer of some classes and fails
    with others: both are NoTokenizer here.
    """
    source.intact(*TOKENIZER_FILES)
    has_words = any(any(source.path.glob(pattern)) for pattern in VOCABULARIES)
    missing = NoTokenizer(f"{what}: it has no tokenizer (found no file with a vocabulary)")
    try:
        with loading(what):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                source.path, trust_remote_code=trust_remote_code
            )
    except LorafoldError as error:
        raise error if has_words else missing from error
    names = list((getattr(tokenizer, "vocab_files_names", None) or {}).values())
    if names and not has_words:
        raise missing
    source.intact(*(name for name in names if name not in TOKENIZER_FILES))
    return tokenizer
