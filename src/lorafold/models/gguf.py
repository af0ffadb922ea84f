"""Unpacks GGUF files to plain models, once, in the user's cache.

A quantized GGUF file can't be trained as it is, and unpacking it takes tens of seconds
(SmolLM2-135M: 25 s). So the first use writes a bf16 safetensors copy, with tokenizer and generation
config, to `$LORAFOLD_CACHE`, else `$XDG_CACHE_HOME/lorafold`, else `~/.cache/lorafold`. Later uses
read the copy. Its name contains the digest of the GGUF file. A damaged copy is made anew.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from lorafold.errors import LorafoldError
from lorafold.files.atomic import MANIFEST, atomic_directory, verify
from lorafold.files.cache import cache_directory
from lorafold.files.digests import of_file
from lorafold.models.load_errors import loading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

UNPACKING = 1  # raise it when copies made by an earlier version must not be used any more


def unpacked(gguf: Path) -> Path:
    """Return the directory of the bf16 copy of a GGUF file, which is made if there is none.

    Processes that run this at the same time make one copy. Raises LorafoldError if transformers
    can't read the file, or if the cache can't be written.
    """
    copy = cache_directory() / "models" / f"{gguf.stem}-{of_file(gguf)[1][:16]}-{UNPACKING}"
    if not (copy / MANIFEST).is_file():
        with _locked(gguf, copy):
            if not (copy / MANIFEST).is_file():
                log.info("unpacking %s to %s (once)", gguf.name, copy)
                shutil.rmtree(copy, ignore_errors=True)
                _unpack(gguf, copy)
    return copy


def renew(gguf: Path, copy: Path) -> None:
    """Make a damaged copy anew, unless another process has done so. Raises as `unpacked` does."""
    with _locked(gguf, copy):
        if problems := verify(copy):
            log.info("%s is damaged (%s): unpacking %s anew", copy, "; ".join(problems), gguf.name)
            _unpack(gguf, copy)


@contextmanager
def _locked(gguf: Path, copy: Path) -> Iterator[None]:
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(copy.with_name(copy.name + ".lock")):
            yield
    except OSError as error:
        raise LorafoldError(
            f"{copy}: the copy of {gguf} could not be written: {error.strerror or error}; set"
            " LORAFOLD_CACHE to another directory"
        ) from error


def _unpack(gguf: Path, copy: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise LorafoldError(f"{gguf}: expected a GGUF file, but it does not begin with GGUF")
    dense = GgufConfig(dequantize=True)
    with loading(str(gguf)):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=dense, dtype=torch.bfloat16
        )
        _isolate_digits(tokenizer)
        with atomic_directory(copy, overwrite=True) as tmp:
            model.save_pretrained(tmp)
            tokenizer.save_pretrained(tmp)


def _isolate_digits(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Make the tokenizer split text at every digit if its vocabulary was learned so, as SmolLM's.

    transformers has no rule for such a byte-level vocabulary in a GGUF file and splits as GPT-2
    does. Two spaces before a digit then give other tokens than the model was trained on. The
    vocabulary is recognized by having no token that joins a digit with another character.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    backend = tokenizer.backend_tokenizer
    learned = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()
    mixed = any(
        len(token) > 1 and any(digit in token for digit in "0123456789") for token in learned
    )
    if isinstance(backend.pre_tokenizer, ByteLevel) and not mixed:
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
