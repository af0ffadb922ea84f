"""Attention inside documents, in C++ beside torch's products of tiles: milliseconds, forward and
backward.

    python benchmarks/attention.py [--rounds 7]

SmolLM2's shape: 9 heads of queries over 3 of keys, of 64 numbers. Both take turns; figures are
medians. Prints a table, which is also written to results/.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from lib.results import keep

from lorafold.kernels import attention as native
from lorafold.ops import attention as tiles
from lorafold.ops.documents import Documents

CPU = torch.device("cpu")
CASES = {
    "8 of 500": Documents((500,) * 8),
    "a beginning of 400, 8 of 100 after it": Documents.forest((500,) * 8, (0, *[400] * 7), CPU),
    "4 of 200": Documents((200,) * 4),
    "1 of 2048": Documents((2048,)),
    "1 of 4096": Documents((4096,)),
}


def milliseconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    forms, scores, table = native.forms(), tiles.Scores(64**-0.5, None), []
    for name, docs in CASES.items():
        for dtype in (torch.bfloat16, torch.float32):
            n = sum(docs.own)
            q, g, k, v = (torch.randn(n, h, 64).to(dtype) for h in (9, 9, 3, 3))
            steps = [
                partial(forms.document_attention, q, k, v, docs, scores),
                partial(forms.document_attention_backward, g, q, k, v, docs, scores),
                partial(tiles._attended, q, k, v, docs, scores),
                partial(tiles._attended_backward, g, q, k, v, docs, scores),
            ]
            found = [[milliseconds(step) for step in steps] for _ in range(asked.rounds + 1)][1:]
            a, b, c, d = (statistics.median(column) for column in zip(*found, strict=True))
            table.append(
                {
                    "documents": name, "dtype": str(dtype).removeprefix("torch."),
                    "C++, forward": a, "backward": b, "tiles, forward": c, "backward ": d,
                    "times as fast": (c + d) / (a + b),
                }
            )  # fmt: skip
            print(table[-1], flush=True)
    keep("attention", table)


if __name__ == "__main__":
    main()
