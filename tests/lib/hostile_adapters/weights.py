"""Weights: the header of a file of safetensors, and the values behind it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile_adapters.case import WEIGHTS, either, wrong

OFFSETS = "data_offsets"  # where a tensor begins and ends


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


@wrong
def weights_long_header(at: Path) -> None:
    """A header of a terabyte, by its length."""
    (at / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 40) + (at / WEIGHTS).read_bytes()[8:])


@wrong
def weights_negative_header(at: Path) -> None:
    """A header of a negative length."""
    (at / WEIGHTS).write_bytes(struct.pack("<q", -1) + (at / WEIGHTS).read_bytes()[8:])


@wrong
def weights_large_header(at: Path) -> None:
    """A header of 20 MB of spaces, beside tensors that are right."""
    header(at, lambda head, data: (json.dumps(head).encode() + b" " * (20 << 20), data))


@wrong
def weights_large_header_nan(at: Path) -> None:
    """The same with values that are not finite, which nobody looks for behind such a header."""
    header(
        at, lambda head, data: (json.dumps(head).encode() + b" " * (20 << 20), b"\xff" * len(data))
    )


@wrong
def weights_overlap(at: Path) -> None:
    """Two tensors in one place."""
    header(at, lambda head, data: (head | {"x": {**list(head.values())[-1]}}, data))


@wrong
def weights_many(at: Path) -> None:
    """A hundred thousand empty tensors."""
    none = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header(at, lambda head, data: (head | {f"{i}": none for i in range(100_000)}, data))


@wrong
def weights_some(at: Path) -> None:
    """Ten thousand unknown tensors, for each of which there is something to say."""
    none = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header(at, lambda head, data: (head | {f"{i}": none for i in range(10_000)}, data))


@wrong
def weights_shape(at: Path) -> None:
    """A shape whose product overflows to the right size."""
    header(at, lambda head, data: (first(head, shape=[2**32, 2**32]), data))


@wrong
def weights_deep(at: Path) -> None:
    """A header of nested lists."""
    header(at, lambda head, data: (b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", data))


@wrong
def weights_dtype(at: Path) -> None:
    """A type that there is not."""
    header(at, lambda head, data: (first(head, dtype="F4096"), data))


@wrong
def weights_dtype_list(at: Path) -> None:
    """A type that is no text."""
    header(at, lambda head, data: (first(head, dtype=["F32"]), data))


@wrong
def weights_trailing(at: Path) -> None:
    """Bytes after the tensors, behind a header that was seen before."""
    header(at, lambda head, data: (head, data + bytes(4096)))


@wrong
def weights_metadata(at: Path) -> None:
    """Metadata that is none, in a header that is otherwise known."""
    header(at, lambda head, data: (head | {"__metadata__": {"format": [1]}}, data))


@wrong
def weights_twice(at: Path) -> None:
    """A tensor that is there twice."""
    header(at, lambda head, data: (doubled(head), data))


def doubled(head: dict[str, Any]) -> bytes:
    """A header whose first tensor is there twice, first with another shape."""
    name = next(key for key in head if key != "__metadata__")
    other = json.dumps({name: head[name] | {"shape": [1, 1]}})
    return (other[:-1] + "," + json.dumps(head)[1:]).encode()


@wrong
def weights_cut(at: Path) -> None:
    """A file that ends in the middle of its data."""
    (at / WEIGHTS).write_bytes((at / WEIGHTS).read_bytes()[:-100])


@wrong
def weights_empty(at: Path) -> None:
    """A file of nothing."""
    (at / WEIGHTS).write_bytes(b"")


@wrong
def weights_pickle(at: Path) -> None:
    """A pickle under another name."""
    (at / WEIGHTS).write_bytes(b"\x80\x04cposix\nsystem\n(S'touch /tmp/hostile-ran'\ntR.")


@wrong
def weights_missing(at: Path) -> None:
    """No weights but a pickle."""
    (at / WEIGHTS).rename(at / "adapter_model.bin")


@wrong
def weights_nan(at: Path) -> None:
    """NaN in fp32."""
    header(at, lambda head, data: (head, b"\xff" * 4 + data[4:]))


def halves(kind: str, bits: bytes) -> Callable[[Path], None]:
    """Weights of a type of 16 bits, all of them with these bits."""

    def alter(at: Path) -> None:
        def change(head: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
            found = {
                name: about | {"dtype": kind, "data_offsets": [n // 2 for n in about[OFFSETS]]}
                for name, about in head.items() if name != "__metadata__"
            }  # fmt: skip
            return found, bits * (len(data) // 4)

        header(at, change)

    return alter


@wrong
def weights_inf_f16(at: Path) -> None:
    """Infinity in fp16."""
    halves("F16", b"\x00\x7c")(at)


@wrong
def weights_nan_bf16(at: Path) -> None:
    """NaN in bf16."""
    halves("BF16", b"\xc0\x7f")(at)


@wrong
def weights_nan_f8(at: Path) -> None:
    """NaN in a type of 8 bits."""

    def change(head: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
        found = {
            name: about | {"dtype": "F8_E4M3", "data_offsets": [n // 4 for n in about[OFFSETS]]}
            for name, about in head.items() if name != "__metadata__"
        }  # fmt: skip
        return found, b"\x7f" * (len(data) // 4)

    header(at, change)


@either
def weights_huge_values(at: Path) -> None:
    """Finite values that make logits infinite at run time."""
    header(at, lambda head, data: (head, struct.pack("<f", 1e38) * (len(data) // 4)))


@wrong
def weights_codes(at: Path) -> None:
    """Integers where floats are expected."""
    header(at, lambda head, data: (first(head, dtype="I32"), data))
