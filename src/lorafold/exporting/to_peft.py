"""Exports for PEFT and for servers that take its plain LoRA: one rank, one alpha, no patterns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from lorafold.exporting.canonical import FILES, write_canonical
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
        base = subject.base.name
        launch = (
            "from peft import PeftModel",
            f'PeftModel.from_pretrained(model, "{{out}}/adapter")  # over {base}',
        )
        return Written(
            tuple(f"adapter/{name}" for name in FILES),
            launch,
            (f"rank {update.rank} at every site, scale 1",),
            {"adapter": "{out}/adapter", "base": str(subject.base.source.path)},
        )
