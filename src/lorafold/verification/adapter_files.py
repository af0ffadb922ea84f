"""Verification of an adapter's files in a worker process, and their digests.

The configuration and the record must be JSON of bounded size and depth with finite numbers;
patterns must match the names of the base's modules in bounded time; the header of the weights must
fit the file, and all values must be finite. Later `lorafold.adapter` checks that the adapter fits
the base, from the bytes of these digests.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from lorafold.errors import LorafoldError
from lorafold.files.atomic import MANIFEST
from lorafold.files.contents import Contents
from lorafold.files.safetensors_header import check_num_elements, tensor_spans

TEXT = 8 << 20  # bytes of a JSON file, and of the header of the weights
DEPTH, VALUES = 64, 1 << 18  # levels, and keys and values of JSON; a header has nine per tensor
FIELDS = 1 << 16  # keys and values of a configuration or a record
LONG = 1 << 18  # characters of one text
INTEGERS = 1 << 63  # bound of integers
# CPU seconds of all patterns on one module's path, which later blocks the server, and on all paths
AT_ONCE, PATTERNS = 0.02, 0.5
WEIGHTS = "adapter_model.safetensors"
# by safetensors dtype: the integer type to view them as, and the exponent bits, which are all set
# for NaN and infinity
FLOATS = {
    "F64": (np.uint64, 0x7FF0000000000000), "F32": (np.uint32, 0x7F800000),
    "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80),
}  # fmt: skip
PIECE = 1 << 20  # values checked at a time


def verified(
    modules: Sequence[str], path: str, files: Sequence[str], config: str, record: str,
    read_by: Sequence[str], most_parameters: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Verify an adapter's files and return the fields of `checks.VerifiedFiles`. `config` and
    `record` are JSON; the record's fields `read_by` determine how the rest is read.
    """
    directory = Path(path)
    for name in (config, record, MANIFEST):
        file = directory / name
        if file.is_file() and (size := file.stat().st_size) > TEXT:
            raise LorafoldError(f"{name}: found {size:,} bytes, expected at most {TEXT:,}")
    if most_parameters is not None and (directory / WEIGHTS).is_file():
        header_of = partial(_json, "header", most=VALUES)
        check_num_elements(directory / WEIGHTS, most_parameters, TEXT, header_of)
    contents = Contents(directory, files)
    contents.check_intact()
    if config not in contents.files:
        raise LorafoldError(f"found no {config}, expected the directory of an adapter")
    present = [name for name in (config, record) if name in contents.files]
    read = {name: _json(name, contents.files[name], FIELDS) for name in present}
    _match(read[config], modules)
    header, widest = "", 0
    if WEIGHTS in contents.files:
        header, widest = _header(contents.files[WEIGHTS])
    fields = {name: read.get(record, {}).get(name) for name in read_by}
    form = json.dumps([read[config], header, fields], sort_keys=True)
    return {"files": contents.entries, "form": sha256(form.encode()).hexdigest(), "widest": widest}


def _json(name: str, content: bytes | bytearray, most: int) -> dict[str, Any]:
    """The object in a file with at most `most` keys and values. Rejects everything that another
    parser could read differently.
    """

    def constant(text: str) -> None:
        raise LorafoldError(f"{name}: found {text}, expected a finite number")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            raise LorafoldError(f"{name}: found a duplicate key, expected unique keys")
        return fields

    try:
        value = json.loads(content.decode("utf-8"), parse_constant=constant, object_pairs_hook=once)
    except ValueError as error:
        raise LorafoldError(f"{name}: not readable as JSON ({error})") from None
    except RecursionError:
        raise LorafoldError(f"{name}: found JSON that is nested too deeply") from None
    if not isinstance(value, dict):
        raise LorafoldError(f"{name}: found {type(value).__name__}, expected an object")
    for n, (depth, where, inner) in enumerate(_values(value)):
        if depth > DEPTH or n > most:
            raise LorafoldError(f"{name}: expected at most {DEPTH} levels and {most:,} values")
        if wrong := _wrong(inner):
            raise LorafoldError(f"{name}: {where!r:.200}: {wrong}")
    return value


def _wrong(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"found {value}, expected a finite number"
    if isinstance(value, int) and abs(value) >= INTEGERS:
        return "found an integer of more than 63 bits"
    if isinstance(value, str) and len(value) > LONG:
        return f"found {len(value):,} characters, expected at most {LONG:,}"
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        return "found an unpaired surrogate, expected valid text"
    return ""


def _values(value: Any) -> Iterator[tuple[int, str, Any]]:
    """Yield every key and value with its depth and top-level field."""
    left = [(0, "", value)]
    while left:
        depth, where, value = left.pop()
        yield depth, where, value
        if isinstance(value, dict):
            pairs = [(depth + 1, where or key, (key, inner)) for key, inner in value.items()]
            left += [(below, name, each) for below, name, pair in pairs for each in pair]
        elif isinstance(value, list):
            left += [(depth + 1, where, inner) for inner in value]


def _match(config: Mapping[str, Any], modules: Sequence[str]) -> None:
    """Match the configuration's patterns with the base's modules, in every way in which loading
    does. An endless match is ended by the process's time limit.
    """
    begun = time.process_time()
    compiled = []
    for field, pattern in _patterns(config):
        try:
            compiled.append((field, [re.compile(form) for form in _forms(field, pattern)]))
        except (re.error, RecursionError, OverflowError) as error:
            raise LorafoldError(f"{field}: found an invalid regular expression ({error})") from None
        _in_time(field, begun, PATTERNS)
    for path in modules:
        for field, forms in compiled:
            begun_path = time.process_time()
            for form in forms:
                form.match(path)
            _in_time(field, begun_path, AT_ONCE)
            _in_time(field, begun, PATTERNS)


def _in_time(field: str, since: float, most: float) -> None:
    if time.process_time() - since > most:
        raise LorafoldError(
            f"{field}: matching the patterns with the base's modules takes more than {most:g} s"
        )


def _forms(field: str, pattern: str) -> tuple[str, ...]:
    """The regular expressions into which loading converts a pattern."""
    whole = rf"(?:{pattern})\Z"
    return {
        "layers_pattern": (rf"(?:^|.*?\.){pattern}\.(\d+)\.",),
        "modules_to_save": (rf"(^|.*\.){pattern}($|\..*)",),
    }.get(field, (whole, rf"(.*\.)?({pattern})$"))


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for field in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        value = config.get(field)
        patterned = field in ("layers_pattern", "modules_to_save")  # other lists are names
        patterns = value if isinstance(value, list) and patterned else [value]
        yield from ((field, pattern) for pattern in patterns if isinstance(pattern, str))
    for field in ("rank_pattern", "alpha_pattern"):
        value = config.get(field)
        yield from ((field, p) for p in (value if isinstance(value, dict) else {}))


def _header(content: bytearray) -> tuple[str, int]:
    """(digest of the safetensors header, largest tensor dimension). The header must fit the file
    exactly, and all values must be finite.
    """
    size = int.from_bytes(content[:8], "little")
    if size > TEXT:
        problem = f"found a header of {size:,} bytes"
        raise LorafoldError(f"{WEIGHTS}: {problem}, expected at most {TEXT:,}")
    try:
        tensors = tensor_spans(content, partial(_json, "header", most=VALUES))
    except LorafoldError as error:
        raise LorafoldError(f"{WEIGHTS}: not readable as safetensors: {error}") from None
    data = memoryview(content)
    for name, place in tensors.items():
        if place.dtype in ("F8_E4M3", "F8_E5M2"):
            expected = f"expected one of {', '.join(FLOATS)}, or integers"
            problem = f"dtype: found {place.dtype}, {expected}"
            raise LorafoldError(f"{WEIGHTS}: {name!r:.200}: {problem}")
        values = data[place.start : place.stop]
        if place.dtype in FLOATS and not _finite(values, *FLOATS[place.dtype]):
            raise LorafoldError(f"{WEIGHTS}: {name!r:.200}: found NaN or infinity")
    widest = max((n for place in tensors.values() for n in place.shape), default=0)
    return sha256(content[: 8 + size]).hexdigest(), widest


def _finite(data: memoryview, kind: Any, exponent: int) -> bool:
    width = np.dtype(kind).itemsize
    values = np.frombuffer(data[: len(data) // width * width], kind)
    mask = kind(exponent)
    return not any(
        ((values[at : at + PIECE] & mask) == mask).any() for at in range(0, len(values), PIECE)
    )
