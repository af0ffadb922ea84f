"""Writes a model in Hugging Face's format as one GGUF file, a few rows of a tensor at a time.

    header | metadata | names, shapes, types and places of tensors | tensors

Memory: the largest parameter in the type that its file has, and some megabytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafold.data.render import ensure_chat_template
from lorafold.errors import LorafoldError
from lorafold.exporting.gguf_metadata import add_metadata, architecture_of
from lorafold.exporting.gguf_positions import add_positions
from lorafold.exporting.gguf_tensors import Placed, tensors_of
from lorafold.exporting.gguf_tokenizer import add_tokenizer
from lorafold.exporting.gguf_types import EMBEDDING, OUTPUT, encoded, number_of, size_of, type_of
from lorafold.exporting.target import Progress
from lorafold.generation import end_tokens
from lorafold.models.checkpoint import mapped_model_of
from lorafold.models.sources import resolve_model
from lorafold.models.tokenizer import tokenizer_of

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILE_TYPES = {
    "F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0",
    "Q5_1": "MOSTLY_Q5_1", "Q5_0": "MOSTLY_Q5_0", "Q4_1": "MOSTLY_Q4_1", "Q4_0": "MOSTLY_Q4_0",
}  # fmt: skip


def write_model(
    directory: Path,
    out: Path,
    tensors: str,
    progress: Progress,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str | None = None,
) -> Sequence[str]:
    """Write a model as a GGUF file.

    Args:
        directory: of the model: config.json, safetensors, tokenizer.
        out: the file, which is replaced.
        tensors: the type of matrices, a key of `FILE_TYPES`.
        progress: called as progress(bytes, all) after each tensor.
        tokenizer: another one than the directory's.
        name: of the model, for people; None is the directory's.

    Returns:
        What an engine computes otherwise than the model, a sentence each.

    Raises LorafoldError for a model or a tokenizer that the format can't say, for values that the
    type does not have, and if the disk has no room.
    """
    import gguf
    import torch

    source = resolve_model(directory)
    model = mapped_model_of(source).model
    config: Any = model.config
    row = architecture_of(config)
    writer = gguf.GGUFWriter(out, row.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name or directory.name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[tensors]])
    if tensors.startswith("Q"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    notes = [*add_metadata(writer, config, row)]
    beside = add_positions(writer, config, row)
    own = tokenizer or tokenizer_of(source, ())
    ensure_chat_template(own)
    ends = sorted(_ends(model, directory, own))
    add_tokenizer(writer, own, model.get_input_embeddings().weight.shape[0], ends)
    placed = [*tensors_of(model, config, row)]
    placed += [Placed(n, tuple(t.shape), lambda t=t: t) for n, t in beside.items()]  # type: ignore[misc]
    tied = OUTPUT not in {one.name for one in placed}
    kinds = {one.name: type_of(one.name, one.shape, tensors, tied) for one in placed}
    sizes = [size_of(one.shape, kinds[one.name]) for one in placed]
    odd = [n for n, k in kinds.items() if k == "F16" != tensors]
    if odd:
        notes.append(f"{len(odd)} matrices are F16, because their rows are no whole blocks")
    _need_room(out, sum(sizes))
    for one, size in zip(placed, sizes, strict=True):
        kind = number_of(kinds[one.name])
        writer.add_tensor_info(one.name, one.shape, torch.empty(0).numpy().dtype, size, kind)
    with _disk(out), torch.inference_mode():
        _write(writer, placed, kinds, sizes, progress)
    return notes


def _ends(
    model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """The tokens that end a completion, by the directory's files."""
    from transformers import GenerationConfig

    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return end_tokens(model, tokenizer)


def _write(
    writer: gguf.GGUFWriter,
    placed: Sequence[Placed],
    kinds: dict[str, str],
    sizes: Sequence[int],
    progress: Progress,
) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file, done, total = writer.fout[0], 0, sum(sizes)
    writer.write_padding(file, file.tell())
    for one, size in zip(placed, sizes, strict=True):
        for piece in encoded(one.name, one.values(), kinds[one.name]):
            file.write(piece.tobytes())
        writer.write_padding(file, size)
        done += size
        progress(done, total)
    writer.close()


@contextmanager
def _disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LorafoldError(f"{out}: it could not be written: {error.strerror or error}") from error


def _need_room(out: Path, size: int) -> None:
    if (free := shutil.disk_usage(out.parent).free) < size:
        raise LorafoldError(
            f"{out.parent}: the disk has {free / 1e9:.1f} GB left, the file needs"
            f" {size / 1e9:.1f} GB; free some space or choose another --out"
        )
