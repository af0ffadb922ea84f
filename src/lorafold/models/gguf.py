"""GGUF files as plain models: unpacked once, kept in the user's cache.

A quantized GGUF can't be trained as it is, and unpacking takes tens of seconds (SmolLM2-135M: 25
s). So the first use writes a bf16 safetensors copy with tokenizer and generation config to
`$LORAFOLD_CACHE`, else `$XDG_CACHE_HOME/lorafold`, else `~/.cache/lorafold`; later uses, and
whatever reads safetensors only, take the copy. Its name holds the digest of the GGUF file. A copy
that was damaged since is made anew.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from lorafold.errors import LorafoldError
from lorafold.files.atomic import MANIFEST, atomic_directory, sha256, verify
from lorafold.files.cache import cache_directory
from lorafold.models.load_errors import loading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

UNPACKING = 1  # raise it when copies made by an earlier version are no longer good


def unpacked(gguf: Path) -> Path:
    """The directory of the bf16 copy of `gguf`, made now if there is none.

    Processes that ask at the same time make one copy.

    Raises LorafoldError where the file is no GGUF that transformers reads, or the cache can't be
    written.
    """
    copy = cache_directory() / "models" / f"{gguf.stem}-{sha256(gguf)[:16]}-{UNPACKING}"
    if not (copy / MANIFEST).is_file():
        with _locked(gguf, copy):
            if not (copy / MANIFEST).is_file():
                log.info("unpacking %s to %s (once)", gguf.name, copy)
                shutil.rmtree(copy, ignore_errors=True)
                _unpack(gguf, copy)
    return copy


def renew(gguf: Path, copy: Path) -> None:
    """Make a damaged copy anew, unless another process has. LorafoldError as `unpacked`."""
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
            f"{copy}: the copy of {gguf} was not written: {error.strerror or error}; LORAFOLD_CACHE"
            " moves it"
        ) from error


def _unpack(gguf: Path, copy: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise LorafoldError(f"{gguf}: not a GGUF file (it does not begin with GGUF)")
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
    """Split text at every digit where the vocabulary was learned so (SmolLM's).

    transformers splits a byte-level vocabulary that it has no rule for as GPT-2 does, which gives
    other tokens than the model was trained on where two spaces come before a digit. Such a
    vocabulary is known by its having no token with a digit and anything else.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    backend = tokenizer.backend_tokenizer
    learned = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()
    mixed = any(
        len(token) > 1 and any(digit in token for digit in "0123456789") for token in learned
    )
    if isinstance(backend.pre_tokenizer, ByteLevel) and not mixed:
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
