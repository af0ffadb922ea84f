"""Whether the hub answers, found by one short look: its libraries would try for half a minute.

    with asked_once() as away:
        ...             what is asked of the hub here comes from this machine alone, if `away` says
                        why the hub is not asked
"""

from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 5.0  # to wait for an answer


@contextmanager
def asked_once() -> Iterator[str]:
    """If the hub does not answer, hub libraries use only local files in the `with` block. Yields
    the reason; empty if the hub answers.
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
    """The directory in which models of the hub are kept."""
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _silent(address: str) -> str:
    """Why the hub is not asked; empty if it answered anything at all."""
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import get_session

    try:
        get_session().head(address, timeout=SECONDS)
    except (OSError, HTTPError):
        return f"{address} does not answer"
    return ""
