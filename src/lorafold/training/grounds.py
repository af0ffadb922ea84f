"""What the figures of runs depend on besides their recipe and rows, for whoever keeps figures.

    digest_of([grounds(base, recipe.chat_template, "comparing"), recipe, rows.sha256])
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorafold.data.template_forms import day_of
from lorafold.files.contents import of_file
from lorafold.identity import COMPUTED_WITH, TRAINING, of_code
from lorafold.models.tokenizer import BUILT_IN, set_template
from lorafold.opening import Base
from lorafold.peft.saved import Saved

FILES = "files"  # the name of the model's identity


def grounds(
    base: Base, template: str | None, *rooms: str
) -> dict[str, Any]:
    """The identity of the model and of a chat template, how and where the model is loaded, and the
    code.

    Args:
        base: The model, whose storage is settled.
        template: The recipe's chat template, whose file may change.
        *rooms: The packages that measure, besides those that train.
    """
    file = None if template is None or template in BUILT_IN else of_file(Path(template))[1]
    return {
        FILES: base.identity,
        "device": base.where.type,
        "storage": [base.held.name, str(base.held.dtype)],
        "chat_template": file,
        "code": of_code(*TRAINING, *rooms, packages=COMPUTED_WITH),
    }


def day_written(base: Base, template: str | None, saved: Sequence[Saved] = ()) -> str:
    """The date of today where the chat template asks for it, so that figures are kept for one day;
    else empty.

    Args:
        base: The model.
        template: The recipe's chat template.
        saved: The adapters that are loaded, one of which may have a tokenizer of its own.
    """
    tokenizer = base.tokenizer(saved)
    if template is not None:
        set_template(tokenizer, template)
    return day_of(tokenizer)
