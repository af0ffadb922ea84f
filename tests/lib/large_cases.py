"""Rows that are large data once the threshold is lowered, and short runs on them."""

import json
from pathlib import Path

import lorafold as lf
from lorafold.data import row_store
from lorafold.data import rows as reading
from lorafold.data.row_sources import parse_source
from lorafold.data.stream import RowStream

N = 2100  # three batches


def lowered() -> None:
    """Let data of 100 kB be large, in this process."""
    row_store.MAX_IN_MEMORY = reading.MAX_IN_MEMORY = 100_000


def stream_of(*sources: object, wanted: str = "") -> RowStream:
    """The stream of one or several sources, whose first rows are checked."""
    stream = RowStream(tuple(parse_source(str(source)) for source in sources), wanted)
    stream.remarks()
    return stream


def row(n: int) -> dict:
    return {
        "completion": f'{{"people": {n % 7}, "naïve 🙂": {n}}}',
        "prompt": f"Book a table for {n % 7} on day {n}, {'very ' * (n % 5)}early.",
    }


def written(path: Path, n: int = N, first: int = 0) -> Path:
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(first, first + n)))
    return path


def train(data: object, out: Path, model: Path, **fields: object) -> None:
    resume = bool(fields.pop("resume", False))
    recipe = lf.Recipe(**{"steps": 12, "batch": 4, "storage": "fp32", "save_every": 5} | fields)
    again = {"resume": resume, "overwrite": resume}
    lf.train(recipe, data=data, out=out, model=str(model), device="cpu", **again)
