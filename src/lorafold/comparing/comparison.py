"""What `lf.compare` returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lorafold.comparing.measure import Measurement
from lorafold.comparing.paired_tests import Difference, over_base, verdict
from lorafold.comparing.report import markdown
from lorafold.files.html_page import ShownInNotebooks


@dataclass(frozen=True)
class Comparison(ShownInNotebooks):
    """The figures of every method, setting and seed, in the order asked for, and what they were
    measured on. Those of the base come first.
    """

    rows: tuple[Measurement, ...]
    model: str
    source: str

    @property
    def over_base(self) -> dict[str, Difference]:
        """By how much each line's reward is above the base's, paired by prompts; or its loss,
        paired by rows, where below 0 is better. A line is named as in "lora" or "lora rank=8".
        """
        return over_base(self.rows)

    @property
    def verdict(self) -> str:
        """The method of the lowest loss or the highest reward, where the held-out rows and at least
        three seeds tell it from all others; else those among which they can't tell.
        """
        return verdict(self.rows)

    def as_json(self) -> dict[str, Any]:
        """The figures under the keys of `lorafold compare --json`."""
        gains = {method: asdict(one) for method, one in self.over_base.items()}
        rows = [asdict(one) for one in self.rows]
        for row in rows:
            del row["row_losses"]  # one for each held-out row; OUT/rows.json has them
        return {"rows": rows, "over_base": gains, "verdict": self.verdict}

    def __str__(self) -> str:
        return markdown(self.rows)
