"""Writes a model with merged adapters as one GGUF file, a few rows of a tensor at a time.

    model.layers.0.self_attn.q_proj.weight    ->  blk.0.attn_q.weight, rows interleaved in llama
    model.layers.0.input_layernorm.weight     ->  blk.0.attn_norm.weight, plus 1 in gemma
    ...mlp.experts.gate_up_proj (E, 2 I, H)   ->  blk.0.ffn_gate_exps.weight, ffn_up_exps (E, I, H)

A tied head is left out, because llama.cpp uses the embedding instead. The largest parameter is held
in memory in its stored dtype, and in three fp32 copies if adapters change it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from lorafold.core.attach import Adapted
from lorafold.core.expert_matrices import module_at
from lorafold.data.render import ensure_chat_template
from lorafold.errors import LorafoldError, NotMergeable, listed
from lorafold.exporting.gguf_metadata import (
    Architecture,
    add_metadata,
    add_positions,
    add_tokenizer,
    architecture_of,
)
from lorafold.exporting.target import DOWN, GATE_UP, Progress, SiteFactors, Subject
from lorafold.fold.plan import TensorShape, plan_fold
from lorafold.fold.quantization_round_trip import ROUND_TRIP
from lorafold.generation import end_tokens
from lorafold.merging.merged_tensors import before_and_after, check_disk_space
from lorafold.models.weight_conversion import LazyTensor
from lorafold.resolve import Base

FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCKS = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
BLOCK = 32
OUTPUT, EMBEDDING, ROUTER = "output.weight", "token_embd.weight", "ffn_gate_inp.weight"
CHUNK = 1 << 22  # weights converted at a time
HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class MergedParameter:
    path: str
    shape: TensorShape
    values: Callable[[], Tensor]

    @classmethod
    def known(cls, path: str, values: Tensor) -> MergedParameter:
        """Wraps an existing tensor of any shape."""
        return cls(path, tuple(values.shape), lambda: values)

    def part(self, shape: Sequence[int], of: Callable[[Tensor], Tensor]) -> MergedParameter:
        """The parameter with a function applied to its values: (*, in), or (n,) for a vector."""
        return MergedParameter(self.path, tuple(shape), lambda: of(self.values()))


def merged_parameters(model: nn.Module, names: Sequence[str]) -> Iterator[MergedParameter]:
    plan = plan_fold(model, (ROUND_TRIP, *names))
    if plan.problems:
        raise NotMergeable(listed((f"{path}: {why}" for path, why in plan.problems), "; "))

    def changed(name: str) -> Tensor:
        path, leaf = plan.sites[name]
        module: Adapted = module_at(model, path)  # type: ignore[assignment]
        return before_and_after(module, names, leaf)[1]

    def same(parameter: Tensor) -> Tensor:
        return parameter.make() if isinstance(parameter, LazyTensor) else parameter

    untied = {name for first, others in plan.untied.items() for name in (first, *others)}
    seen: set[int] = set()
    left = dict(plan.shapes)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        shape = left.pop(path, None)
        if ".deltas." in path or (id(parameter) in seen and path not in untied):
            continue
        seen.add(id(parameter))
        if shape is None:
            yield MergedParameter(path, tuple(parameter.shape), partial(same, parameter))
        else:
            yield MergedParameter(path, shape, partial(changed, path))
    for path, shape in left.items():  # new biases
        yield MergedParameter(path, shape, partial(changed, path))


def tensor_type(name: str, shape: TensorShape, tensors: str, tied: bool) -> str:
    if len(shape) < 2 or name.endswith(ROUTER):
        return "F32"
    if tensors in FLOAT_TYPES:
        return tensors
    if shape[-1] % BLOCK:
        return "F16"
    return "Q8_0" if name == (EMBEDDING if tied else OUTPUT) else tensors


def encoded_size(shape: TensorShape, kind: str) -> int:
    per, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(torch.Size(shape).numel()) // per * size


def encode(name: str, values: Tensor, kind: str) -> Iterator[np.ndarray]:
    """Yields the bytes of a tensor of any shape, in pieces."""
    rows, number = values.reshape(-1, values.shape[-1]), gguf.GGMLQuantizationType[kind]
    step = max(CHUNK // rows.shape[-1], 1)
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step]
        if kind in FLOAT_TYPES:
            narrow = chunk.to(FLOAT_TYPES[kind]).contiguous()
            if kind == "F16" and not narrow.isfinite().all():
                raise LorafoldError(
                    f"gguf: {name} has a value of {float(chunk.float().abs().max()):.3g}, above"
                    f" F16's maximum of 65,504; use --tensors BF16 or F32"
                )
            yield narrow.view(torch.uint8).numpy()
        else:
            yield gguf.quants.quantize(chunk.float().contiguous().numpy(), number)


def tensor_names(arch: Architecture, layers: int) -> gguf.TensorNameMap:
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[arch.name], layers)


def gguf_tensors(
    parameters: Iterable[MergedParameter], config: Any, arch: Architecture
) -> Iterator[MergedParameter]:
    names = tensor_names(arch, config.num_hidden_layers)
    for parameter in parameters:
        path, _, leaf = parameter.path.rpartition(".")
        if experts := leaf in (GATE_UP, DOWN):
            path, leaf = parameter.path, "weight"
        for part, count, of in _split_parameter(path, experts, config, arch):
            if arch.norm_offset and parameter.path.endswith("norm.weight"):
                of = partial(_add_offset, arch.norm_offset)
            name = names.get_name(f"{part}.{leaf}", try_suffixes=SUFFIXES)
            if name is None:
                raise LorafoldError(f"llama.cpp has no tensor for the parameter {part}.{leaf}")
            shape = parameter.shape
            if count > 1:
                shape = (shape[0], shape[1] // count, shape[2])
            yield replace(parameter.part(shape, of) if of else parameter, path=name)


def _split_parameter(
    path: str, experts: bool, config: Any, arch: Architecture
) -> Iterator[tuple[str, int, Callable[[Tensor], Tensor] | None]]:
    stem, _, module = path.rpartition(".")
    if experts and module == GATE_UP:
        for n, half in enumerate(("gate_proj", "up_proj")):
            yield f"{stem}.{half}", 2, partial(_half, n)
    elif arch.interleaved and module in HEADS:
        yield path, 1, partial(interleave, heads=getattr(config, HEADS[module]))
    else:
        yield path, 1, None


def _add_offset(gain: float, values: Tensor) -> Tensor:
    return values.float() + gain


def _half(n: int, values: Tensor) -> Tensor:
    return values.chunk(2, 1)[n]


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Reorders rows (heads * width, ...) so that the two rows of each rotated pair are adjacent."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def adapter_tensors(
    factors: SiteFactors, config: Any, arch: Architecture
) -> tuple[dict[str, Tensor], list[str]]:
    """The file's tensors (any shape) by name, and the reasons why modules can't be exported."""
    names = tensor_names(arch, config.num_hidden_layers)
    tensors = {}
    problems = []
    tied = bool(config.tie_word_embeddings)
    for path, (up, down) in factors.items():
        for part, _, of in _split_parameter(path, up.dim() == 3, config, arch):
            name = names.get_name(f"{part}.weight", try_suffixes=SUFFIXES)
            if name is None:
                problems.append(f"{path}: llama.cpp has no tensor for this module in {arch.name}")
            elif tied and name in (EMBEDDING, OUTPUT):
                problems.append(
                    f"{path}: the embedding and the head are tied, and llama.cpp supports no"
                    " adapter on the shared matrix"
                )
            else:
                tensors[f"{name}.lora_a"] = down.mT if name == EMBEDDING else down
                tensors[f"{name}.lora_b"] = of(up) if of else up
    return tensors, problems


FILE_TYPES = {
    "F16": "MOSTLY_F16", "F32": "ALL_F32", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0",
    "Q5_1": "MOSTLY_Q5_1", "Q5_0": "MOSTLY_Q5_0", "Q4_1": "MOSTLY_Q4_1", "Q4_0": "MOSTLY_Q4_0",
}  # fmt: skip
# llama.cpp requires these tokens in a file with such a name
PHI, PHI_TOKENS = re.compile(r"(phi)-?(?=3)", re.I), {"<unk>", "<s>", "</s>", "<|endoftext|>"}


def write_model(directory: Path, out: Path, tensors: str, progress: Progress) -> Sequence[str]:
    return write_gguf(Subject(Base(directory), ()), out, tensors, progress)


def write_gguf(subject: Subject, out: Path, tensors: str, progress: Progress) -> Sequence[str]:
    return write_content(gguf_content(subject, tensors), out, tensors, progress)


@dataclass(frozen=True)
class GgufContent:
    """The content of a GGUF file that is not written yet, and notes on differences in llama.cpp."""

    writer: gguf.GGUFWriter
    tensors: Sequence[MergedParameter]
    notes: Sequence[str]

    @property
    def shapes(self) -> dict[str, TensorShape]:
        return {tensor.path: tensor.shape for tensor in self.tensors}


def write_content(
    content: GgufContent, out: Path, tensors: str, progress: Progress
) -> Sequence[str]:
    writer, tied = content.writer, OUTPUT not in content.shapes
    kinds = {n: tensor_type(n, shape, tensors, tied) for n, shape in content.shapes.items()}
    sizes = {n: encoded_size(shape, kinds[n]) for n, shape in content.shapes.items()}
    done, total = 0, sum(sizes.values())
    check_disk_space(out.parent, total, "the file")
    for name, shape in content.shapes.items():
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
            for tensor in content.tensors:
                for piece in encode(tensor.path, tensor.values(), kinds[tensor.path]):
                    file.write(piece.tobytes())
                writer.write_padding(file, sizes[tensor.path])
                done += sizes[tensor.path]
                progress(done, total)
    except OSError as error:
        raise LorafoldError(f"{out}: can't be written: {error.strerror or error}") from error
    if odd := [n for n, kind in kinds.items() if kind == "F16" != tensors]:
        return [*content.notes, f"{len(odd)} matrices are F16: their rows are no multiple of 32"]
    return content.notes


def gguf_content(subject: Subject, tensors: str) -> GgufContent:
    """The metadata and tensors of a model's file; values are computed when they are written."""
    from transformers import GenerationConfig

    model: Any = subject.model
    config, tokenizer, directory = model.config, subject.tokenizer, subject.base.source.path
    arch = architecture_of(config)
    writer = gguf.GGUFWriter(None, arch.name)
    writer.add_type(gguf.GGUFType.MODEL)
    name, whole = Path(subject.base.name).name, tokenizer.get_vocab().keys() >= PHI_TOKENS
    writer.add_name(name if whole else PHI.sub(r"\1 ", name))
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[tensors]])
    if tensors.startswith("Q"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    notes = add_metadata(writer, config, arch)
    positions = add_positions(writer, config, arch)
    placed = [*gguf_tensors(merged_parameters(model, subject.names), config, arch)]
    placed += [MergedParameter.known(name, tensor) for name, tensor in positions.items()]
    shapes = {parameter.path: parameter.shape for parameter in placed}
    # llama.cpp ignores output.weight in these and uses the embedding
    if arch.name in ("gemma", "gemma2") and OUTPUT in shapes:
        raise LorafoldError(
            "with these adapters, lm_head and the embedding differ, but llama.cpp uses the"
            f" embedding as the head in {arch.name}; expected adapters that change neither"
        )
    rows = shapes[EMBEDDING][0]
    writer.add_vocab_size(rows)
    ensure_chat_template(tokenizer)
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    add_tokenizer(writer, tokenizer, rows, sorted(end_tokens(model, tokenizer)))
    return GgufContent(writer, placed, notes)
