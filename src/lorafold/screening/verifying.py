"""The files of an adapter, read in a process of their own: whether they may be interpreted without
harm, and what they are by digest.

The configuration and the record are JSON of a bounded size and depth, of finite numbers; patterns
match the names of the base's modules in bounded time; the header of the weights fits the file, and
all values are finite. Whether an adapter fits the base is for `lorafold.adapter` to say, from the
bytes of this digest.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from lorafold.errors import LorafoldError
from lorafold.files.contents import Contents

TEXT = 8 << 20  # bytes of one file of JSON, and of the header of the weights
DEPTH, STRINGS = 64, 1 << 20
PATTERNS, ONE = 1.0, 0.05  # seconds of the processor that all patterns may take, and one match
# fields with patterns, and what stands around one in `lorafold.peft` and `lorafold.core`
FORMS = {
    "target_modules": r"(?:%s)\Z",
    "exclude_modules": r"(?:%s)\Z",
    "rank_pattern": r"(.*\.)?(%s)$",
    "alpha_pattern": r"(.*\.)?(%s)$",
    "modules_to_save": r"(^|.*\.)%s($|\..*)",
    "layers_pattern": r"(?:^|.*?\.)%s\.(\d+)\.",
}
WEIGHTS = "adapter_model.safetensors"
# by their names in safetensors: the integers as which they are read, and the bits of the exponent,
# which are all set in a number that is not finite
FLOATS = {
    "F64": (np.uint64, 0x7FF0000000000000), "F32": (np.uint32, 0x7F800000),
    "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80),
}  # fmt: skip
PIECE = 1 << 20  # numbers that are looked at at a time


def verified(
    modules: Sequence[str], path: str, files: Sequence[str], config: str, record: str,
    told: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """What the files of an adapter are: `digest`, `digests` by name, and `form`, which adapters
    have in common that differ in nothing but their values. Raises LorafoldError.

    Args:
        modules: the paths of the base's modules.
        path: the adapter's directory.
        files: the files that belong to it.
        config, record: the two among them that are JSON.
        told: the fields of the record that say how to read the rest.
    """
    directory = Path(path)
    for name in (*files, "manifest.json"):
        file = directory / name
        if name != WEIGHTS and file.is_file() and (size := file.stat().st_size) > TEXT:
            raise LorafoldError(f"{name}: found {size:,} bytes, expected at most {TEXT:,}")
    contents = Contents(directory, files)
    contents.check_intact()
    if config not in contents.files:
        raise LorafoldError(f"found no {config}, expected the directory of an adapter")
    there = [name for name in (config, record) if name in contents.files]
    read = {name: _json(name, contents.files[name]) for name in there}
    _match(read[config], modules)
    header = _header(contents.files.get(WEIGHTS, b""))
    about = {name: read.get(record, {}).get(name) for name in told}
    form = json.dumps([read[config], header, about], sort_keys=True)
    return {
        "digest": contents.digest,
        "digests": contents.digests,
        "form": sha256(form.encode()).hexdigest(),
    }


def _json(name: str, content: bytes) -> dict[str, Any]:
    def constant(text: str) -> None:
        raise LorafoldError(f"{name}: found {text}, expected a finite number")

    try:
        value = json.loads(content.decode("utf-8"), parse_constant=constant)
    except ValueError as error:
        raise LorafoldError(f"{name}: not readable as JSON ({error})") from None
    except RecursionError:
        raise LorafoldError(f"{name}: found JSON that is nested without end") from None
    if not isinstance(value, dict):
        raise LorafoldError(f"{name}: found {type(value).__name__}, expected an object")
    for n, (depth, where, inner) in enumerate(_values(value)):
        if depth > DEPTH or n > STRINGS:
            raise LorafoldError(
                f"{name}: expected at most {DEPTH} levels and {STRINGS:,} values"
            )
        if isinstance(inner, float) and not math.isfinite(inner):
            raise LorafoldError(f"{name}: {where}: found {inner}, expected a finite number")
    return value


def _values(value: Any) -> Iterator[tuple[int, str, Any]]:
    """Every value with its depth and the field in which it stands."""
    left: list[tuple[int, str, Any]] = [(0, "", value)]
    while left:
        depth, where, value = left.pop()
        yield depth, where, value
        if isinstance(value, dict):
            left += [(depth + 1, where or str(key), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            left += [(depth + 1, where, inner) for inner in value]


def _match(config: Mapping[str, Any], modules: Sequence[str]) -> None:
    """Try the configuration's patterns on the base's modules. One that never ends is ended with the
    process.
    """
    begun = before = time.process_time()
    for field, pattern in _patterns(config):
        try:
            form = re.compile(FORMS[field] % pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise LorafoldError(f"{field}: found no regular expression ({error})") from None
        for path in modules:
            form.match(path)
            now = time.process_time()
            if now - before > ONE or now - begun > PATTERNS:
                told = "its patterns take too long to match the base's modules"
                raise LorafoldError(f"{field}: {told}")
            before = now


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for field in FORMS:
        value = config.get(field)
        patterned = field in ("layers_pattern", "modules_to_save")  # else a list has names
        many = isinstance(value, dict) or (isinstance(value, list) and patterned)
        given: Any = value if many else [value]
        yield from ((field, pattern) for pattern in given if isinstance(pattern, str))


def _header(content: bytes) -> dict[str, Any]:
    """The tensors of a safetensors file by name: type, shape and place. Raises LorafoldError for
    one that does not fit the file, or has values that are not finite.
    """
    size = int.from_bytes(content[:8], "little")
    if not 0 < size <= min(TEXT, len(content) - 8):
        return {}  # whoever reads the weights says what is wrong with them
    header = _json(WEIGHTS, content[8 : 8 + size])
    header.pop("__metadata__", None)
    data = memoryview(content)[8 + size :]
    for name, about in header.items():
        known = isinstance(about, dict) and isinstance(about.get("dtype"), str)
        places: Any = about.get("data_offsets") if known else None
        pair = isinstance(places, list) and [type(place) for place in places] == [int, int]
        start, stop = places if pair else (0, -1)
        if not 0 <= start <= stop <= len(data):
            raise LorafoldError(f"{WEIGHTS}: {name[:200]}: it does not lie in the file")
        if about["dtype"] in FLOATS and not _finite(data[start:stop], *FLOATS[about["dtype"]]):
            raise LorafoldError(f"{WEIGHTS}: {name[:200]}: found NaN or infinity")
    return header


def _finite(data: memoryview, kind: Any, exponent: int) -> bool:
    width = np.dtype(kind).itemsize
    numbers = np.frombuffer(data[: len(data) // width * width], kind)
    mask = kind(exponent)
    return not any(
        ((numbers[at : at + PIECE] & mask) == mask).any() for at in range(0, len(numbers), PIECE)
    )
