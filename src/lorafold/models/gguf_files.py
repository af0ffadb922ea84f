"""GGUF files as they are found: one that is a whole model, or several that are one model together.

    model.gguf
    model-00001-of-00003.gguf  model-00002-of-00003.gguf  ...     the first has the metadata, and
                                                                  each has some of the tensors

Transformers reads one file and fills what it does not find with random numbers. So the files of a
split model are joined before it reads them.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lorafold.errors import LorafoldError, listed
from lorafold.models.load_errors import one_line

if TYPE_CHECKING:
    from gguf import GGUFReader

SUFFIX = ".gguf"
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
BESIDE = "mmproj"  # how the files of a model's towers begin


def files_of(file: Path) -> tuple[Path, ...]:
    """The files of the model that one of its files belongs to, in their order."""
    named = PART.fullmatch(file.name)
    if named is None:
        return (file,)
    stem, _, count = named.groups()
    found = [file.with_name(f"{stem}-{n:05}-of-{count}{SUFFIX}") for n in range(1, int(count) + 1)]
    if absent := [part.name for part in found if not part.is_file()]:
        raise LorafoldError(
            f"model {file}: one of {int(count)} files; missing beside it: {listed(absent)}"
        )
    return tuple(found)


def models_of(names: Iterable[str]) -> list[list[str]]:
    """The files of each model among those of a repository, in their order, without encoders'."""
    models: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.suffix == SUFFIX and not path.name.startswith(BESIDE):
            part = PART.fullmatch(path.name)
            key = (path.name,) if part is None else (part[1], part[3])
            models.setdefault((str(path.parent), *key), []).append(name)
    return list(models.values())


def files_in(folder: Path) -> tuple[Path, ...]:
    """The files of the only model in a folder; none if it has no GGUF files."""
    files = sorted(p for p in folder.glob(f"*{SUFFIX}") if not p.name.startswith(BESIDE))
    models = list(dict.fromkeys(map(files_of, files)))
    if len(models) > 1:
        names = listed(parts[0].name for parts in models)
        raise LorafoldError(
            f"model {folder}: found {len(models)} GGUF models in it, expected one of them: {names}"
        )
    return models[0] if models else ()


def read(files: Sequence[Path]) -> list[GGUFReader]:
    """Read the metadata of the files of a model, and check that each is a whole GGUF file at its
    place in their order.
    """
    from gguf import GGUFReader

    readers = []
    for number, file in enumerate(files):
        try:
            reader = GGUFReader(file)
        except (OSError, ValueError, LookupError, OverflowError) as error:
            raise LorafoldError(
                f"{file}: expected a GGUF file, but it is none, was cut short, or is newer than the"
                f" package gguf: {one_line(error)}"
            ) from error
        check_places(reader, file)
        readers.append(reader)
        own, count = value(reader, "split.no") or 0, value(reader, "split.count") or 1
        if (own, count) != (number, len(files)):
            raise LorafoldError(
                f"{file}: its metadata says that it is file {own + 1} of {count}, expected file"
                f" {number + 1} of {len(files)}; the files of a model are named"
                f" NAME-00001-of-{count:05}{SUFFIX} and so on, in one folder"
            )
    wanted, found = value(readers[0], "split.tensors.count"), sum(len(r.tensors) for r in readers)
    if wanted not in (None, found):
        raise LorafoldError(f"{files[0]}: found {found} tensors, expected {wanted}")
    return readers


def check_places(reader: GGUFReader, file: Path) -> None:
    """Raise LorafoldError unless the tensors fill a file from the end of its header on without
    gaps. With a wrong number, type or offset in the header, bytes would be read as values that they
    are not.
    """
    end = 0
    for tensor in reader.tensors:
        found = tensor.data_offset - reader.data_offset
        if found != end:
            raise LorafoldError(
                f"{file}: its header is damaged: found {tensor.name} at byte {found} of the"
                f" tensors, expected {end}, where the one before it ends"
            )
        end += -(-int(tensor.n_bytes) // reader.alignment) * reader.alignment
    left = len(reader.data) - reader.data_offset - end
    if left >= reader.alignment:
        raise LorafoldError(
            f"{file}: its header is damaged: found {left} bytes after the last of the"
            f" {len(reader.tensors)} tensors that it names, expected none"
        )


def value(reader: GGUFReader, key: str) -> Any:
    """The value of a key of a file's metadata; None if there is none."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


@contextmanager
def one_file(files: Sequence[Path]) -> Iterator[Path]:
    """A file with the metadata and the names of all tensors of a model, but not all values."""
    with tempfile.TemporaryDirectory() as folder:
        file = files[0]
        if len(files) > 1:
            file = Path(folder) / f"joined{SUFFIX}"
            join(read(files), file, values=False)
        yield file


def join(readers: Sequence[GGUFReader], out: Path, *, values: bool = True) -> None:
    """Write the files of a model, in their order, as one; without `values` it has holes of their
    size.
    """
    import numpy as np

    first, tensors = readers[0], [tensor for reader in readers for tensor in reader.tensors]
    count: Any = first.fields["GGUF.tensor_count"].parts[0]
    metadata = max(f.offset + sum(p.nbytes for p in f.parts) for f in first.fields.values())
    alignment = int(first.alignment)
    before = 4 + 4  # the magic and the version
    with out.open("wb") as file:
        file.write(first.data[:before].tobytes())
        file.write(np.array([len(tensors)], count.dtype).tobytes())
        file.write(first.data[before + count.nbytes : metadata].tobytes())
        offsets, end = [], 0
        for tensor in tensors:
            *header, offset = tensor.field.parts
            offsets.append(end)
            file.writelines(part.tobytes() for part in header)
            file.write(np.array([end], offset.dtype).tobytes())
            end += -(-tensor.n_bytes // alignment) * alignment
        start = -(-file.tell() // alignment) * alignment
        for tensor, offset in zip(tensors, offsets, strict=True) if values else ():
            file.seek(start + offset)
            tensor.data.tofile(file)
        file.truncate(start + end)
