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
    """The figures of every method, setting and seed, the base's first."""

    rows: tuple[Measurement, ...]
    model: str
    source: str

    @property
    def over_base(self) -> dict[str, Difference]:
        """The difference to the base's reward or loss, paired by rows, by the name of the line."""
        return over_base(self.rows)

    @property
    def verdict(self) -> str:
        """The best method if rows and seeds distinguish it, else those that can't be told apart."""
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
