"""transformers, called quietly: while a model or tokenizer loads, no progress bars or notices, and
one line for what goes wrong.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from lorafold.errors import LorafoldError


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Silence transformers inside the block, and turn its many errors into a LorafoldError that
    begins with `what`.
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
        KeyError,
        ImportError,
        RuntimeError,
        SafetensorError,
        StrictDataclassError,
    ) as error:
        raise LorafoldError(f"{what}: transformers can't load it: {one_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def one_line(error: Exception, limit: int = 300) -> str:
    """The error's message, at most `limit` characters, without line breaks."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
