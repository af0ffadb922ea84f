"""What the figures of runs depend on besides their recipe and rows, for whoever keeps figures.

    digest_of([grounds(source, "bf16", recipe.chat_template, "comparing"), recipe, rows.sha256])
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorafold.files.digests import of_file
from lorafold.identity import COMPUTED_WITH, TRAINING, of_code, of_model
from lorafold.machine.devices import choose_device
from lorafold.models.sources import ModelSource
from lorafold.models.storage import choose_storage
from lorafold.models.tokenizer import BUILT_IN

FILES = "files"  # the name of the model's identity


def grounds(
    source: ModelSource,
    base: str,
    template: str | None,
    *rooms: str,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The identity of the model and of a chat template, how and where the model is loaded, and the
    code.

    Args:
        source: The model.
        base: How it stores its weights, as `choose_storage` takes it.
        template: The recipe's chat template, whose file may change.
        *rooms: The packages that measure, besides those that train.
        device: As asked for.
        trust_remote_code: The model's own Python files run.
    """
    where = choose_device(device)
    storage = choose_storage(base, where)
    file = None if template is None or template in BUILT_IN else of_file(Path(template))[1]
    return {
        FILES: of_model(source, trust_remote_code),
        "device": where.type,
        "storage": [storage.name, str(storage.dtype)],
        "chat_template": file,
        "code": of_code(*TRAINING, *rooms, packages=COMPUTED_WITH),
    }
