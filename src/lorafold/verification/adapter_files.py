"""Verifies and hashes the files of an untrusted adapter, in a worker process.

The configuration and the record must be JSON of bounded size and depth with finite numbers.
Matching the configuration's patterns with the base's module names must take bounded time. The
safetensors header must describe the file exactly, and all weights must be finite.
`lorafold.adapter` checks later that the adapter fits the base, and reads only bytes with these
digests.
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

MAX_BYTES = 8 << 20  # bytes of a JSON file, and of the header of the weights
# levels of JSON, and the number of its keys and values; a header has nine per tensor
MAX_DEPTH, MAX_HEADER_VALUES = 64, 1 << 18
MAX_CONFIG_VALUES = 1 << 16  # number of keys and values of a configuration or a record
MAX_CHARACTERS = 1 << 18  # characters of a JSON string
INTEGER_BOUND = 1 << 63
# CPU seconds for matching a pattern with one module's path, because the server blocks during the
# same match later; and for matching all patterns with all paths
SECONDS_PER_PATH, PATTERN_SECONDS = 0.02, 0.5
WEIGHTS = "adapter_model.safetensors"
# for each floating-point dtype of safetensors, the integer dtype of the same width, and the mask of
# the exponent bits, which are all set in NaN and infinity
FLOATS = {
    "F64": (np.uint64, 0x7FF0000000000000), "F32": (np.uint32, 0x7F800000),
    "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80),
}  # fmt: skip
CHUNK = 1 << 20  # values checked at once, to bound memory


def verify_files(
    modules: Sequence[str], path: str, files: Sequence[str], config: str, record: str,
    read_by: Sequence[str], most_parameters: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Verifies an adapter's files and returns the fields of `checks.VerifiedFiles`. `config` and
    `record` name the JSON files; `read_by` names the record's fields that affect loading.
    """
    directory = Path(path)
    for name in (config, record, MANIFEST):
        file = directory / name
        if file.is_file() and (size := file.stat().st_size) > MAX_BYTES:
            raise LorafoldError(f"{name}: found {size:,} bytes, expected at most {MAX_BYTES:,}")
    if most_parameters is not None and (directory / WEIGHTS).is_file():
        header_of = partial(_parse_json, "header", limit=MAX_HEADER_VALUES)
        check_num_elements(directory / WEIGHTS, most_parameters, MAX_BYTES, header_of)
    contents = Contents(directory, files)
    contents.check_intact()
    if config not in contents.files:
        raise LorafoldError(f"found no {config}, expected the directory of an adapter")
    present = [name for name in (config, record) if name in contents.files]
    parsed = {name: _parse_json(name, contents.files[name], MAX_CONFIG_VALUES) for name in present}
    _check_patterns(parsed[config], modules)
    header, widest = "", 0
    if WEIGHTS in contents.files:
        header, widest = _check_weights(contents.files[WEIGHTS])
    fields = {name: parsed.get(record, {}).get(name) for name in read_by}
    form = json.dumps([parsed[config], header, fields], sort_keys=True)
    return {"files": contents.entries, "form": sha256(form.encode()).hexdigest(), "widest": widest}


def _parse_json(name: str, content: bytes | bytearray, limit: int) -> dict[str, Any]:
    """Parses an object with at most `limit` keys and values. Rejects JSON that another parser could
    read differently, such as duplicate keys.
    """

    def reject(text: str) -> None:
        raise LorafoldError(f"{name}: found {text}, expected a finite number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            raise LorafoldError(f"{name}: found a duplicate key, expected unique keys")
        return fields

    try:
        text = content.decode("utf-8")
        value = json.loads(text, parse_constant=reject, object_pairs_hook=unique)
    except ValueError as error:
        raise LorafoldError(f"{name}: not readable as JSON ({error})") from None
    except RecursionError:
        raise LorafoldError(f"{name}: found JSON that is nested too deeply") from None
    if not isinstance(value, dict):
        raise LorafoldError(f"{name}: found {type(value).__name__}, expected an object")
    for n, (depth, where, inner) in enumerate(_walk(value)):
        if depth > MAX_DEPTH or n > limit:
            raise LorafoldError(f"{name}: expected at most {MAX_DEPTH} levels and {limit:,} values")
        if wrong := _value_problem(inner):
            raise LorafoldError(f"{name}: {where!r:.200}: {wrong}")
    return value


def _value_problem(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"found {value}, expected a finite number"
    if isinstance(value, int) and abs(value) >= INTEGER_BOUND:
        return "found an integer of more than 63 bits"
    if isinstance(value, str) and len(value) > MAX_CHARACTERS:
        return f"found {len(value):,} characters, expected at most {MAX_CHARACTERS:,}"
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        return "found an unpaired surrogate, expected valid text"
    return ""


def _walk(value: Any) -> Iterator[tuple[int, str, Any]]:
    """Yields (depth, top-level field, value) of every key and value."""
    pending = [(0, "", value)]
    while pending:
        depth, where, value = pending.pop()
        yield depth, where, value
        if isinstance(value, dict):
            pairs = [(depth + 1, where or key, (key, inner)) for key, inner in value.items()]
            pending += [(below, name, each) for below, name, pair in pairs for each in pair]
        elif isinstance(value, list):
            pending += [(depth + 1, where, inner) for inner in value]


def _check_patterns(config: Mapping[str, Any], modules: Sequence[str]) -> None:
    """Matches the configuration's patterns with the base's module paths, with the regular
    expressions that loading uses, and raises if this is slow. The process's CPU limit ends an
    endless match.
    """
    start = time.process_time()
    compiled = []
    for field, pattern in _patterns(config):
        try:
            compiled.append((field, [re.compile(form) for form in _regexes(field, pattern)]))
        except (re.error, RecursionError, OverflowError) as error:
            raise LorafoldError(f"{field}: found an invalid regular expression ({error})") from None
        _check_time(field, start, PATTERN_SECONDS)
    for path in modules:
        for field, forms in compiled:
            path_start = time.process_time()
            for form in forms:
                form.match(path)
            _check_time(field, path_start, SECONDS_PER_PATH)
            _check_time(field, start, PATTERN_SECONDS)


def _check_time(field: str, start: float, seconds: float) -> None:
    if time.process_time() - start > seconds:
        raise LorafoldError(
            f"{field}: the patterns need more than {seconds:g} s of CPU time; simplify them"
        )


def _regexes(field: str, pattern: str) -> tuple[str, ...]:
    return {
        "layers_pattern": (rf"(?:^|.*?\.){pattern}\.(\d+)\.",),
        "modules_to_save": (rf"(^|.*\.){pattern}($|\..*)",),
    }.get(field, (rf"(?:{pattern})\Z", rf"(.*\.)?({pattern})$"))


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for field in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        value = config.get(field)
        patterned = field in ("layers_pattern", "modules_to_save")  # other lists are names
        patterns = value if isinstance(value, list) and patterned else [value]
        yield from ((field, pattern) for pattern in patterns if isinstance(pattern, str))
    for field in ("rank_pattern", "alpha_pattern"):
        value = config.get(field)
        yield from ((field, p) for p in (value if isinstance(value, dict) else {}))


def _check_weights(content: bytearray) -> tuple[str, int]:
    """Returns (SHA-256 of the safetensors header, largest tensor dimension). Raises unless the
    header describes the file exactly and all values are finite.
    """
    size = int.from_bytes(content[:8], "little")
    if size > MAX_BYTES:
        problem = f"found a header of {size:,} bytes"
        raise LorafoldError(f"{WEIGHTS}: {problem}, expected at most {MAX_BYTES:,}")
    try:
        tensors = tensor_spans(content, partial(_parse_json, "header", limit=MAX_HEADER_VALUES))
    except LorafoldError as error:
        raise LorafoldError(f"{WEIGHTS}: not readable as safetensors: {error}") from None
    data = memoryview(content)
    for name, place in tensors.items():
        if place.dtype in ("F8_E4M3", "F8_E5M2"):
            expected = f"expected one of {', '.join(FLOATS)}, or integers"
            problem = f"dtype: found {place.dtype}, {expected}"
            raise LorafoldError(f"{WEIGHTS}: {name!r:.200}: {problem}")
        values = data[place.start : place.stop]
        if place.dtype in FLOATS and not _is_finite(values, *FLOATS[place.dtype]):
            raise LorafoldError(f"{WEIGHTS}: {name!r:.200}: found NaN or infinity")
    widest = max((n for place in tensors.values() for n in place.shape), default=0)
    return sha256(content[: 8 + size]).hexdigest(), widest


def _is_finite(data: memoryview, kind: Any, exponent: int) -> bool:
    width = np.dtype(kind).itemsize
    values = np.frombuffer(data[: len(data) // width * width], kind)
    mask = kind(exponent)
    return not any(
        ((values[at : at + CHUNK] & mask) == mask).any() for at in range(0, len(values), CHUNK)
    )
