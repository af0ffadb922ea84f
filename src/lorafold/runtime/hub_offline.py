"""Checks once, with a short timeout, whether the hub answers; its libraries would retry for half a
minute.
"""

from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 5.0  # to wait for an answer


@contextmanager
def asked_once() -> Iterator[str]:
    """Makes hub libraries use only local files in the block if the hub doesn't answer. Yields the
    reason, or an empty text.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    away = "HF_HUB_OFFLINE is set" if before else _silent(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = bool(away)
    try:
        yield away
    finally:
        constants.HF_HUB_OFFLINE = before


def cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _silent(address: str) -> str:
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import get_session

    try:
        get_session().head(address, timeout=SECONDS)
    except (OSError, HTTPError):
        return f"{address} does not answer"
    return ""
