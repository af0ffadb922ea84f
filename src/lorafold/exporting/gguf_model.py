"""Writes a model as one GGUF file, adapters folded in, a few rows of a tensor at a time.

    header | metadata | names, shapes, types and places of tensors | tensors

Memory: the largest parameter in the type that its file has, three times one in fp32 that adapters
change, and some megabytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch

from lorafold.data.render import ensure_chat_template
from lorafold.errors import LorafoldError
from lorafold.exporting.gguf_metadata import (
    add_metadata,
    add_positions,
    add_tokenizer,
    architecture_of,
)
from lorafold.exporting.gguf_tensors import (
    EMBEDDING,
    OUTPUT,
    MergedParameter,
    encoded,
    folded,
    size_of,
    tensors_of,
    type_of,
)
from lorafold.exporting.target import Progress
from lorafold.generation import end_tokens
from lorafold.merging.merged_tensors import need_space
from lorafold.models.checkpoint import mapped_model_of
from lorafold.models.sources import resolve_model
from lorafold.models.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILE_TYPES = {
    "F16": "MOSTLY_F16", "F32": "ALL_F32", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0",
    "Q5_1": "MOSTLY_Q5_1", "Q5_0": "MOSTLY_Q5_0", "Q4_1": "MOSTLY_Q4_1", "Q4_0": "MOSTLY_Q4_0",
}  # fmt: skip
# llama.cpp looks these tokens up in a file that has such a name, and refuses it where one lacks
PHI, PHI_TOKENS = re.compile(r"(phi)-?(?=3)", re.I), {"<unk>", "<s>", "</s>", "<|endoftext|>"}
ONE_MATRIX = ("gemma", "gemma2")  # whose output is the embedding in llama.cpp, whatever a file has


@dataclass(frozen=True)
class Content:
    """The content of a file: a model on its files, adapters to merge, its directory and tokenizer.
    """

    model: PreTrainedModel
    adapters: Sequence[str]
    directory: Path
    tokenizer: PreTrainedTokenizerBase
    name: str


def write_model(directory: Path, out: Path, tensors: str, progress: Progress) -> Sequence[str]:
    """Write the model of a directory in Hugging Face's format, as `write_content` does."""
    source = resolve_model(directory)
    model, tokenizer = mapped_model_of(source).model, read_tokenizer(source)
    content = Content(model, (), directory, tokenizer, directory.name)
    return write_content(content, out, tensors, progress)


def write_content(content: Content, out: Path, tensors: str, progress: Progress) -> Sequence[str]:
    """Write a model as a GGUF file, and return what an engine computes differently."""
    return write_described(described(content, tensors), out, tensors, progress)


@dataclass(frozen=True)
class Described:
    """A file before it is written, and notes on what an engine computes differently."""

    writer: gguf.GGUFWriter
    tensors: Sequence[MergedParameter]
    notes: Sequence[str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors, by name."""
        return {one.path: one.shape for one in self.tensors}


def write_described(
    made: Described, out: Path, tensors: str, progress: Progress
) -> Sequence[str]:
    """Write a file; arguments and result are those of `write_content`."""
    writer, tied = made.writer, OUTPUT not in made.shapes
    kinds = {n: type_of(n, shape, tensors, tied) for n, shape in made.shapes.items()}
    sizes = {n: size_of(shape, kinds[n]) for n, shape in made.shapes.items()}
    done, total = 0, sum(sizes.values())
    need_space(out.parent, total, "the file")
    for name, shape in made.shapes.items():
        kind = gguf.GGMLQuantizationType[kinds[name]]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), sizes[name], kind)
    try:
        with closing(writer), torch.no_grad():
            writer.write_header_to_file(out)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            assert writer.fout is not None
            file = writer.fout[0]
            writer.write_padding(file, file.tell())
            for one in made.tensors:
                for piece in encoded(one.path, one.values(), kinds[one.path]):
                    file.write(piece.tobytes())
                writer.write_padding(file, sizes[one.path])
                done += sizes[one.path]
                progress(done, total)
    except OSError as error:
        raise LorafoldError(f"{out}: it could not be written: {error.strerror or error}") from error
    if odd := [n for n, kind in kinds.items() if kind == "F16" != tensors]:
        return [*made.notes, f"{len(odd)} matrices are F16: their rows are no whole blocks"]
    return made.notes


def described(content: Content, tensors: str) -> Described:
    """What a file says of a model; nothing is computed or written."""
    config = content.model.config
    row = architecture_of(config)
    writer = gguf.GGUFWriter(None, row.name)
    writer.add_type(gguf.GGUFType.MODEL)
    whole = content.tokenizer.get_vocab().keys() >= PHI_TOKENS
    writer.add_name(content.name if whole else PHI.sub(r"\1 ", content.name))
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[tensors]])
    if tensors.startswith("Q"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    notes = add_metadata(writer, config, row)
    positions = add_positions(writer, config, row)
    placed = [*tensors_of(folded(content.model, content.adapters), config, row)]
    placed += [MergedParameter.known(name, tensor) for name, tensor in positions.items()]
    shapes = {one.path: one.shape for one in placed}
    if row.name in ONE_MATRIX and OUTPUT in shapes:
        raise LorafoldError(
            "adapters change the output's matrix alone, and llama.cpp takes the embedding for it in"
            f" {row.name}; expected adapters that leave lm_head out"
        )
    rows = shapes[EMBEDDING][0]
    writer.add_vocab_size(rows)
    ensure_chat_template(content.tokenizer)
    add_tokenizer(writer, content.tokenizer, rows, _ends(content))
    return Described(writer, placed, notes)


def _ends(content: Content) -> Sequence[int]:
    """The tokens that end a completion, by the directory's files."""
    from transformers import GenerationConfig

    if (content.directory / "generation_config.json").is_file():
        content.model.generation_config = GenerationConfig.from_pretrained(content.directory)
    return sorted(end_tokens(content.model, content.tokenizer))
