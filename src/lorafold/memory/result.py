"""What `lf.estimate` returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lorafold.files.html_page import ShownInNotebooks
from lorafold.memory import report
from lorafold.memory.estimate import SPEED, Estimate
from lorafold.memory.fit import Advice
from lorafold.memory.trace import Setting


@dataclass(frozen=True)
class Forecast(ShownInNotebooks):
    """The memory of a setting at its peak, in bytes by term.

    `advice` says whether it fits a device's memory and what would, if that was asked; `measured`
    has the bytes of a real step, if one was run. `of_this_cpu` is set if the estimate is for this
    machine's CPU instead of a GPU. Of several processes the bytes are those of
    each; `speed` is what a device computes, in operations a second.
    """

    estimate: Estimate
    setting: Setting
    advice: Advice | None = None
    measured: int | None = None
    of_this_cpu: bool = False
    speed: float = SPEED

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.estimate.total

    @property
    def terms(self) -> dict[str, int]:
        """Bytes by term; their sum is the total."""
        return self.estimate.terms

    def remarks(self) -> list[str]:
        """The lines below the terms: the device, whether it fits, and the measured bytes."""
        lines = [report.about(self.setting)] * self.of_this_cpu
        lines += report.together(self.estimate, self.setting, self.speed)
        lines += [] if self.advice is None else report.verdict(self.advice, self.setting)
        lines += [] if self.measured is None else [report.beside(self.estimate, self.measured)]
        return lines

    def as_json(self) -> dict[str, Any]:
        """All figures under the keys of `lorafold estimate --json`."""
        advice = {} if self.advice is None else asdict(self.advice)
        largest = {f"largest_{k}" if k in ("batch", "length") else k: v for k, v in advice.items()}
        measured = {} if self.measured is None else {"measured": self.measured}
        sent = self.estimate.sent
        exchange = (
            {} if sent is None else {"sent": sent.bytes, "bandwidth": sent.bandwidth(self.speed)}
        )
        return {"total": self.total, **self.terms, **exchange, "fits": None, **largest, **measured}

    def __str__(self) -> str:
        return "\n".join([*report.bars(self.estimate), *self.remarks()])
