"""Weights: the header of a file of safetensors, and the values behind it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile_adapters.case import WEIGHTS, cases

OFFSETS = "data_offsets"  # where a tensor begins and ends
EMPTY = {"dtype": "F32", "shape": [0], OFFSETS: [0, 0]}


def header(at: Path, change: Callable[[dict[str, Any], bytes], tuple[Any, bytes]]) -> None:
    """Write the weights anew, with another header and other data."""
    content = (at / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    head, data = change(json.loads(content[8 : 8 + size]), content[8 + size :])
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    (at / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def first(head: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """A header with something else said of its first tensor."""
    name = next(key for key in head if key != "__metadata__")
    return head | {name: head[name] | changed}


def doubled(head: dict[str, Any]) -> bytes:
    """A header whose first tensor is there twice, first with another shape."""
    name = next(key for key in head if key != "__metadata__")
    other = json.dumps({name: head[name] | {"shape": [1, 1]}})
    return (other[:-1] + "," + json.dumps(head)[1:]).encode()


def spaced(head: dict[str, Any]) -> bytes:
    return json.dumps(head).encode() + b" " * (20 << 20)


def all_of(at: Path, kind: str, bits: bytes) -> None:
    """Give all weights these bits, as numbers of a smaller type."""
    share = 4 // len(bits)

    def change(head: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
        found = {
            name: about | {"dtype": kind, OFFSETS: [n // share for n in about[OFFSETS]]}
            for name, about in head.items() if name != "__metadata__"
        }  # fmt: skip
        return found, bits * (len(data) // 4)

    header(at, change)


def content(at: Path, of: bytes) -> None:
    (at / WEIGHTS).write_bytes(of)


cases("weights", {
    "long-header": (
        "A header of a terabyte, by its length.",
        lambda at: content(at, struct.pack("<Q", 1 << 40) + (at / WEIGHTS).read_bytes()[8:]),
    ),
    "negative-header": (
        "A header of a negative length.",
        lambda at: content(at, struct.pack("<q", -1) + (at / WEIGHTS).read_bytes()[8:]),
    ),
    "large-header": (
        "A header of 20 MB of spaces, beside tensors that are right.",
        lambda at: header(at, lambda head, data: (spaced(head), data)),
    ),
    "large-header-nan": (
        "The same with values that are not finite, which nobody looks for behind such a header.",
        lambda at: header(at, lambda head, data: (spaced(head), b"\xff" * len(data))),
    ),
    "overlap": (
        "Two tensors in one place.",
        lambda at: header(at, lambda head, data: (head | {"x": {**[*head.values()][-1]}}, data)),
    ),
    "many": (
        "A hundred thousand empty tensors.",
        lambda at: header(
            at, lambda head, data: (head | {f"{i}": EMPTY for i in range(100_000)}, data)
        ),
    ),
    "some": (
        "Ten thousand unknown tensors, for each of which there is something to say.",
        lambda at: header(
            at, lambda head, data: (head | {f"{i}": EMPTY for i in range(10_000)}, data)
        ),
    ),
    "shape": (
        "A shape whose product overflows to the right size.",
        lambda at: header(at, lambda head, data: (first(head, shape=[2**32, 2**32]), data)),
    ),
    "deep": (
        "A header of nested lists.",
        lambda at: header(
            at, lambda head, data: (b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", data)
        ),
    ),
    "dtype": (
        "A type that there is not.",
        lambda at: header(at, lambda head, data: (first(head, dtype="F4096"), data)),
    ),
    "dtype-list": (
        "A type that is no text.",
        lambda at: header(at, lambda head, data: (first(head, dtype=["F32"]), data)),
    ),
    "trailing": (
        "Bytes after the tensors, behind a header that was seen before.",
        lambda at: header(at, lambda head, data: (head, data + bytes(4096))),
    ),
    "metadata": (
        "Metadata that is none, in a header that is otherwise known.",
        lambda at: header(at, lambda head, data: (head | {"__metadata__": {"format": [1]}}, data)),
    ),
    "twice": (
        "A tensor that is there twice.",
        lambda at: header(at, lambda head, data: (doubled(head), data)),
    ),
    "cut": (
        "A file that ends in the middle of its data.",
        lambda at: content(at, (at / WEIGHTS).read_bytes()[:-100]),
    ),
    "empty": ("A file of nothing.", lambda at: content(at, b"")),
    "pickle": (
        "A pickle under another name.",
        lambda at: content(at, b"\x80\x04cposix\nsystem\n(S'touch /tmp/hostile-ran'\ntR."),
    ),
    "missing": (
        "No weights but a pickle.", lambda at: (at / WEIGHTS).rename(at / "adapter_model.bin")
    ),
    "nan": (
        "NaN in fp32.", lambda at: header(at, lambda head, data: (head, b"\xff" * 4 + data[4:]))
    ),
    "inf-f16": ("Infinity in fp16.", lambda at: all_of(at, "F16", b"\x00\x7c")),
    "nan-bf16": ("NaN in bf16.", lambda at: all_of(at, "BF16", b"\xc0\x7f")),
    "nan-f8": ("NaN in a type of 8 bits.", lambda at: all_of(at, "F8_E4M3", b"\x7f")),
    "codes": (
        "Integers where floats are expected.",
        lambda at: header(at, lambda head, data: (first(head, dtype="I32"), data)),
    ),
})  # fmt: skip
cases("weights", {
    "huge-values": (
        "Finite values that make logits infinite at run time.",
        lambda at: header(
            at, lambda head, data: (head, struct.pack("<f", 1e38) * (len(data) // 4))
        ),
    ),
}, told=False)  # fmt: skip
