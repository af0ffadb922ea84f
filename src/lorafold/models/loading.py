"""Loads a base model and its tokenizer from the directory that `models.sources` finds for a name,
on a device (`machine.devices`) and in a storage (`models.storage`), and checks that no file is
damaged and no weight missing.

`loaded_in_turn` has transformers read one tensor at a time, and `each_kept` is called for each, so
that the model is never whole in memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from lorafold.core.modes import keep_scale
from lorafold.errors import LorafoldError, NoTokenizer, listed
from lorafold.models.architecture import auto_class
from lorafold.models.load_errors import check_complete, loading, tell_unread
from lorafold.models.quantizing import compute_in, read_quantized
from lorafold.models.sources import ModelSource, remember, resolve_model
from lorafold.models.storage import Storage, default_storage
from lorafold.models.weights import MODEL_FILES, shards_left_out

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IN_TURN = "HF_DEACTIVATE_ASYNC_LOAD"  # else threads of transformers read ahead, as far as they get
log = logging.getLogger(__name__)
# the files of a tokenizer, except vocabularies whose names depend on its class
TOKENIZER_FILES = (
    "added_tokens.json",
    "additional_chat_templates/*",
    "chat_template.*",
    "config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
# one of these contains the vocabulary, unless the tokenizer needs none
VOCABULARIES = (
    *("tokenizer.json", "tokenizer.*.json", "tekken.json", "*.model", "*.tiktoken", "*.spm"),
    *("*.bpe", "vocab*", "merges.txt"),
)


@contextmanager
def loaded_in_turn() -> Iterator[None]:
    """Have transformers read a tensor when a module is to get it, and not before."""
    before = os.environ.get(IN_TURN)
    os.environ[IN_TURN] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[IN_TURN]
        else:
            os.environ[IN_TURN] = before


@contextmanager
def each_kept(keep: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `keep` with each parameter and buffer, of any shape, that a module gets, once the next
    one comes or the block ends: until then other hooks may still put another one in its place.
    """
    last: list[tuple[Any, str]] = []

    def before(module: Any, name: str, _: Any) -> None:
        while last:
            owner, own = last.pop()
            found = owner._parameters.get(own, owner._buffers.get(own))
            if found is not None:
                keep(found)
        if module is not None:
            last.append((module, name))

    hooks = [
        register_module_parameter_registration_hook(before),
        register_module_buffer_registration_hook(before),
    ]
    try:
        yield
        before(None, "", None)
    finally:
        for hook in hooks:
            hook.remove()


def load_model(
    source: ModelSource | str | Path,
    storage: Storage | torch.dtype,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Load a language model (`models.architecture` says which), in evaluation mode. Its
    `name_or_path` is the name asked for.

    Raises LorafoldError as `resolve_model` does; if transformers can't load the directory; if the
    files lack weights (which transformers would fill with random numbers); and if lorafold wrote
    the files and they are damaged.

    Args:
        source: The model, or its name.
        storage: How the base stores its weights; a dtype for weights that are not quantized.
        device: Where to load the model.
    """
    source = resolve_model(source)
    what = f"model {source.name}"
    with loading(what):
        from transformers import AutoConfig

        source.intact("config.json")
        trusted = source.trust_remote_code
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=trusted)
        auto = auto_class(config, what)
        model, report = read_weights(auto, source, storage, device)
        check_complete(what, sorted(report["missing_keys"]), report["mismatched_keys"])
        tell_unread(what, sorted(report["unexpected_keys"]))
        return model


def read_weights(
    auto: Any,
    source: ModelSource,
    storage: Storage | torch.dtype,
    device: torch.device | str,
    **config: Any,
) -> tuple[Any, Any]:
    """Load a model, in evaluation mode, and return it with transformers' report on its weights:
    which are missing in the files, which have other shapes, and which it has no place for.

    Raises LorafoldError if files are damaged or missing, or if their weights are quantized and the
    storage is not.

    Args:
        auto: One of transformers' auto classes.
        storage: How the base stores its weights; a dtype for weights that are not quantized.
        device: Where to load the model.
        config: Fields that replace those of the model's configuration.
    """
    import torch

    source.intact(*MODEL_FILES, *["*.py"] * source.trust_remote_code)
    if left_out := shards_left_out(source.path):
        log.warning(
            "model %s: %d files beside its weights are not read: %s",
            source.name, len(left_out), listed(left_out),
        )  # fmt: skip
    wanted = storage if isinstance(storage, Storage) else Storage(storage)
    if wanted.quantization is None and (stored := default_storage(source)) != "auto":
        raise LorafoldError(
            f"model {source.name}: its weights are stored as {stored}; expected the base {stored}"
        )
    if wanted.quantization is None:
        model, info = auto.from_pretrained(
            source.path,
            dtype=wanted.dtype,
            trust_remote_code=source.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # whoever reads the report refuses them by name
            **config,
        )
        model.to(device)
    else:
        model, info = read_quantized(auto, source, wanted, torch.device(device), **config)
        compute_in(model, wanted.dtype)
    keep_scale(model)
    remember(model, source)
    # an adapter's config names its base so
    model.config._name_or_path = model.name_or_path = source.name
    return model.eval(), info


def load_tokenizer(
    source: ModelSource | str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises LorafoldError as `load_model` does, and NoTokenizer if the model has no tokenizer.

    Args:
        source: The model, or its name.
        revision: A branch, tag or commit of a hub model.
        trust_remote_code: Run the code in the model's directory.
    """
    source = resolve_model(source, revision, trust_remote_code)
    return read_tokenizer(source, f"model {source.name}")


def read_tokenizer(source: ModelSource, what: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a directory.

    Raises NoTokenizer if there is no vocabulary (depending on the class, transformers would make an
    empty tokenizer or fail), and LorafoldError if a file is damaged or can't be loaded.

    Args:
        source: The directory.
        what: The name of the tokenizer's owner in messages, such as "model gpt2".
    """
    source.intact(*TOKENIZER_FILES)
    has_words = any(any(source.path.glob(pattern)) for pattern in VOCABULARIES)
    missing = NoTokenizer(f"{what}: it has no tokenizer (found no file with a vocabulary)")
    try:
        with loading(what):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                source.path, trust_remote_code=source.trust_remote_code
            )
    except LorafoldError as error:
        raise error if has_words else missing from error
    names = list((getattr(tokenizer, "vocab_files_names", None) or {}).values())
    if names and not has_words:
        raise missing
    if others := [name for name in names if name not in TOKENIZER_FILES]:
        source.intact(*others)
    return tokenizer
