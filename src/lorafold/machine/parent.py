"""A process that ends when the one that started it is gone, instead of computing on for nobody."""

from __future__ import annotations

import os
from multiprocessing import parent_process
from threading import Thread


def end_with_parent() -> None:
    """Have this process of `multiprocessing` end as soon as its parent does, however that ends."""
    if (parent := parent_process()) is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, name="parent", daemon=True).start()
