"""Reads the header of a safetensors file without its data.

The file contains 8 bytes with the header's length h, h bytes of JSON (name -> dtype, shape,
data_offsets), and the tensors' data without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lorafold.errors import LorafoldError
from lorafold.files.contents import open_regular

MAX_HEADER = 100_000_000  # bytes; the safetensors library has the same limit

# bytes per element of the dtypes that PyTorch supports
ELEMENT_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpan:
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def check_num_elements(
    path: Path, most: int, longest: int = MAX_HEADER, read: Callable[[bytes], Any] = json.loads
) -> None:
    """Raises if the tensors have more than `most` elements in total, or the header more than
    `longest` bytes. `read` parses JSON. Skips files of at most `most` bytes, which can't have more
    elements.
    """
    try:
        with open_regular(path) as (file, end):
            if end <= most:
                return
            size = int.from_bytes(file.read(8), "little")
            if size > longest:
                found = f"found a header of {size:,} bytes, expected at most {longest:,}"
                raise LorafoldError(f"{path}: {found}")
            file.seek(0)
            head = bytearray(file.read(8 + size))
    except OSError as error:
        raise LorafoldError(f"{path}: can't be read ({error.strerror})") from None
    try:
        tensors = tensor_spans(head, read, end)
    except LorafoldError as error:
        raise LorafoldError(f"{path}: not readable as safetensors: {error}") from None
    if (numbers := sum(prod(place.shape) for place in tensors.values())) > most:
        raise LorafoldError(
            f"{path}: found {numbers:,} parameters, expected at most {most:,}, which fit into"
            " memory"
        )


def tensor_spans(
    content: bytearray, read: Callable[[bytes], Any] = json.loads, end: int | None = None
) -> dict[str, TensorSpan]:
    """Returns tensors by name. `content` is the whole file or, if the file's size `end` is given,
    its header. Raises, without the file's name, unless the header describes the file exactly.
    """
    size, end = int.from_bytes(content[:8], "little"), len(content) if end is None else end
    if not 0 < size <= end - 8:
        raise LorafoldError(
            f"the header of {size:,} bytes is empty or does not fit into the file of {end:,} bytes"
        )
    try:
        header = read(bytes(content[8 : 8 + size]))
    except (ValueError, RecursionError) as error:
        raise LorafoldError(f"the header is not JSON ({error})") from None
    if not isinstance(header, Mapping):
        raise LorafoldError("the header is not a JSON object")
    texts = {} if header.get("__metadata__") is None else header["__metadata__"]
    if not (isinstance(texts, Mapping) and all(isinstance(text, str) for text in texts.values())):
        raise LorafoldError("__metadata__: expected an object whose values are strings")
    tensors = {name: about for name, about in header.items() if name != "__metadata__"}
    found = {name: _span(name, about, 8 + size) for name, about in tensors.items()}
    at = 8 + size
    for name, place in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if place.start != at or place.stop > end:
            raise LorafoldError(
                f"{name!r:.200}: found data at bytes {place.start:,} to {place.stop:,}, expected a"
                f" start at {at:,} in a file of {end:,} bytes"
            )
        at = place.stop
    if at != end:
        raise LorafoldError(f"found {end - at:,} bytes after the last tensor")
    return found


def _span(name: str, about: Any, begin: int) -> TensorSpan:
    about = about if isinstance(about, dict) else {}
    dtype, shape, offsets = (about.get(key) for key in ("dtype", "shape", "data_offsets"))
    if dtype not in (*ELEMENT_BYTES,):
        expected = f"expected one of {', '.join(ELEMENT_BYTES)}"
        raise LorafoldError(f"{name!r:.200}: dtype: found {dtype!r:.80}, {expected}")
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not lists or not all(type(n) is int and n >= 0 for n in (*shape, *offsets)):
        raise LorafoldError(
            f"{name!r:.200}: found shape {shape!r:.80} and data_offsets {offsets!r:.80}, expected"
            " lists of non-negative integers, and two offsets"
        )
    size = prod(shape) * ELEMENT_BYTES[dtype]
    if offsets[1] - offsets[0] != size:
        raise LorafoldError(
            f"{name!r:.200}: found {offsets[1] - offsets[0]:,} bytes, expected {size:,} for"
            f" dtype {dtype} and shape {shape!r:.80}"
        )
    return TensorSpan(dtype, tuple(shape), begin + offsets[0], begin + offsets[1])
