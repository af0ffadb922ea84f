"""Exports for PEFT and for servers that take its plain LoRA: one rank, one alpha, no patterns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from lorafold.exporting.plain_lora import (
    FILES,
    TEMPLATE,
    elsewhere,
    write_canonical,
    write_template,
)
from lorafold.exporting.target import Progress, Subject, Target, Written, only_products


class ToPeft(Target):
    """PEFT's own format, for any base that it knows."""

    name: ClassVar[str] = "peft"
    engine: ClassVar[str | None] = "peft"

    def problems(self, subject: Subject) -> Sequence[str]:
        return only_products(subject.update, "a plain LoRA")

    def write(self, subject: Subject, directory: Path, progress: Progress) -> Written:
        update = subject.update
        write_canonical(subject.base, update.factors, directory / "adapter")
        base, template = elsewhere(subject.base), write_template(subject, directory)
        at = f", revision={base.revision!r}" if base.revision else ""
        launch = (
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            f"model = AutoModelForCausalLM.from_pretrained({base.model!r}{at})",
            'model = PeftModel.from_pretrained(model, "{out}/adapter")',
        )
        notes = [f"rank {update.rank} at every site, scale 1", *base.notes]
        if template:
            notes.append(f"the chat template is another than the base's: {TEMPLATE}")
        return Written(
            (*(f"adapter/{name}" for name in FILES), *[TEMPLATE] * template),
            launch,
            tuple(notes),
            {"adapter": "{out}/adapter", "base": str(subject.base.source.path)},
        )
