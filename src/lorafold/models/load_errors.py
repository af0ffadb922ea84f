"""One-line errors for failures in transformers, and checks for missing and unread weights."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lorafold.errors import LorafoldError, listed

log = logging.getLogger(__name__)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """A context that silences transformers' logging and turns errors of transformers into a
    LorafoldError that begins with `what`.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        ImportError,
        RuntimeError,
        SafetensorError,
        StrictDataclassError,
    ) as error:
        if "trust_remote_code=True" in str(error):
            raise LorafoldError(
                f"{what}: loading requires custom Python code; allow it with"
                " --trust-remote-code (trust_remote_code=True)"
            ) from error
        raise LorafoldError(f"{what}: loading in transformers failed: {one_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def one_line(error: Exception, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def check_complete(
    what: str, missing: Sequence[str], misfits: Iterable[tuple[str, Any, Any]] = ()
) -> None:
    """Raises if weights are missing or misshapen, because transformers fills them with random
    values. `misfits` are (name, shape in the files, shape in the model).
    """
    if wrong := [f"{n}: shape {list(a)}, expected {list(b)}" for n, a, b in misfits]:
        raise LorafoldError(f"{what}: {listed(sorted(wrong), '; ')}")
    if missing:
        raise LorafoldError(
            f"{what}: weights missing in the files ({len(missing)}): {listed(missing)}"
        )


def warn_unread(what: str, names: Sequence[str]) -> None:
    """Logs names of tensors in files that have no place in the model."""
    if names:
        log.warning(
            "%s: ignoring tensors in the files (%d), because the model has no such weights: %s",
            what, len(names), listed(names),
        )  # fmt: skip
