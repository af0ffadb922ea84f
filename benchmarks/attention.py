"""Attention inside documents, in C++ beside torch's products of tiles: milliseconds, forward and
backward.

    python benchmarks/attention.py [--rounds 7] [--longest 4096]

SmolLM2's shape: 9 heads of queries over 3 of keys, of 64 numbers. Both take turns and compute the
same values, but for rounding; figures are medians. Prints a table, which is also written to
results/.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lib.results import keep
from lib.short import parsed

from lorafold.kernels import attention as native
from lorafold.ops import attention as tiles
from lorafold.ops.packed_documents import Documents

CPU = torch.device("cpu")
CASES = {
    "8 of 500": Documents((500,) * 8),
    "a prefix of 400, then 8 of 100": Documents.with_shared_prefixes(
        (500,) * 8, (0, *[400] * 7), CPU
    ),
    "4 of 200": Documents((200,) * 4),
    "1 of 2048": Documents((2048,)),
    "1 of 4096": Documents((4096,)),
}


def milliseconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def check(steps: Sequence[Callable[[], Any]]) -> None:
    """End the program where C++ and tiles do not come to the same."""
    forward, backward, *others = (step() for step in steps)
    for own, other in zip((forward, backward), others, strict=True):
        for a, b in zip(flat(own), flat(other), strict=True):
            torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)


def flat(found: Any) -> list[torch.Tensor]:
    """The tensors of a result."""
    return [found] if isinstance(found, torch.Tensor) else [t for t in found if t is not None]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--longest", type=int, default=4096, help="tokens of a case, at most")
    asked = parsed(parser, rounds=1, longest=800)
    forms, scores, table = native._CppAttention(), tiles.Scores(64**-0.5, None), []
    for name, docs in CASES.items():
        if (n := sum(docs.own)) > asked.longest:
            continue
        for dtype in (torch.bfloat16, torch.float32):
            q, g, k, v = (torch.randn(n, h, 64).to(dtype) for h in (9, 9, 3, 3))
            steps = [
                partial(forms.document_attention, q, k, v, docs, scores),
                partial(forms.document_attention_backward, g, q, k, v, docs, scores),
                partial(tiles._attend, q, k, v, docs, scores),
                partial(tiles._attend_backward, g, q, k, v, docs, scores),
            ]
            check(steps)
            found = [[milliseconds(step) for step in steps] for _ in range(asked.rounds + 1)][1:]
            a, b, c, d = (statistics.median(column) for column in zip(*found, strict=True))
            table.append(
                {
                    "documents": name, "dtype": str(dtype).removeprefix("torch."),
                    "C++, forward": a, "C++, backward": b,
                    "tiles, forward": c, "tiles, backward": d,
                    "speed-up": (c + d) / (a + b),
                }
            )  # fmt: skip
            print(table[-1], flush=True)
    keep("attention", table, dtypes="see the rows")


if __name__ == "__main__":
    main()
