"""The figures of `lorafold lab inspect` for one adapter, except losses (`loss_paths`). To save
memory, one base weight at a time is read from the files.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch

from lorafold.adapter import Adapter, load
from lorafold.core.attach import only
from lorafold.core.spec import Spec
from lorafold.errors import NoTokenizer
from lorafold.files.templates import format_value
from lorafold.files.terminal import Progress, no_progress
from lorafold.inspecting.residual_stream import ResidualStream, find_stream, gain, heads_in
from lorafold.inspecting.result import AdapterFigures, Inspection, MatrixFigures, Sites
from lorafold.inspecting.spectra import (
    advice,
    against_base,
    effective_rank,
    entropy_rank,
    in_base_spectrum,
    pooled,
    stable_rank,
)
from lorafold.inspecting.subspaces import NUM_SHOWN, across_experts, across_layers, compare_updates
from lorafold.inspecting.summary import sentences
from lorafold.inspecting.token_directions import (
    Directions,
    find_sides,
    largest_shares,
    mean_nearest,
    near_to,
    read_vectors,
)
from lorafold.inspecting.updates import AdaptedModule, Svd, Svds, largest_of, load_below, modules_of
from lorafold.layers import layer_of
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.resolve import Base
from lorafold.resolve.base import check_language_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Vocabulary = Mapping[str, tuple[torch.Tensor, torch.Tensor | None]]  # by verb: (V, d), gain (d,)
EXPERTS_NOTE = "Among the experts of a block, tokens are shown for the one with the largest update."
FUSED_NOTE = (
    "Fused projections of queries, keys and values are left out, because it is unknown which of"
    " their rows belong to which head."
)


@torch.no_grad()
def inspect(
    base: Base,
    stack: Sequence[SavedAdapter],
    *,
    against: SavedAdapter | None = None,
    directions: str | Path | None = None,
    full: bool = False,
    progress: Progress = no_progress,
) -> Inspection:
    """Analyses the last adapter of a stack, with its base adapters merged. `full` also computes the
    SVD of every base weight.
    """
    check_language_model(base, [*stack, *([against] if against is not None else [])])
    *over, saved = stack
    tokens_left_out = None
    try:
        tokenizer = base.tokenizer(stack)
    except NoTokenizer as error:
        tokenizer, tokens_left_out = None, f"The nearest tokens are left out: {error}."
    model, allowed = base.mapped().model, base.allow_other_base
    below = load_below(model, base, stack)
    adapter = load(model, saved, "inspected", allow_other_base=allowed)
    other = None
    if against is not None:
        with only(model, *below):
            other = load(model, against, "against", allow_other_base=allowed)
    stream = find_stream(model)
    heads, fused = heads_in(model, stream)
    modules, figures, svds = list(modules_of(adapter, below)), {}, {}
    for number, site in enumerate(modules, 1):
        weights = site.weights()
        for name, svd in site.parts():
            figures[name] = matrix_figures(site, svd, weights[name].float(), full)
            if name in heads:
                figures[name] = replace(figures[name], heads=heads[name].shares(svd))
            svds[name] = truncated(site, svd)
        progress(number, len(modules))
    vocabulary = vocabulary_of(model, stream)
    vectors = None if directions is None else read_vectors(directions, stream.size)
    top = {name: svds[name] for name in largest_of(figures)}
    named = named_directions(find_sides(model, stream, top), top, vocabulary, tokenizer, vectors)
    complete = {name: replace(of, **named[name]) for name, of in figures.items()}
    experts, whole = across_experts(svds, stream), adapter_figures(complete)
    overlap = None
    if against is not None and other is not None:
        other_modules = modules_of(other, below if other.over else ())
        other_svds = {n: truncated(site, svd) for site in other_modules for n, svd in site.parts()}
        overlap = compare_updates(str(against), svds, other_svds)
    chance = {verb: mean_nearest(*ends) for verb, ends in vocabulary.items()}
    return Inspection(
        adapter=str(saved),
        model=base.name,
        method=describe_method(adapter.spec),
        beside=count_unmeasured(adapter),
        whole=whole,
        sites=complete,
        layers=across_layers(svds, stream),
        chance_cosine=chance,
        tokens_left_out=tokens_left_out,
        advice=sentences(whole, complete, chance, overlap),
        over=[*map(str, over)] or None,
        against=overlap,
        experts=experts or None,
        experts_left_out=EXPERTS_NOTE if experts else None,
        heads_left_out=FUSED_NOTE if complete.keys() & set(fused) else None,
    )


def describe_method(spec: Spec) -> str:
    parts = [type(spec).__name__]
    for f in fields(spec):  # type: ignore[arg-type]
        value = getattr(spec, f.name)
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if value is not None and (value != default or f.name in ("rank", "alpha")):
            text = describe_method(value) if isinstance(value, Spec) else format_value(value)
            parts.append(f"{f.name.replace('_', ' ')} {text}")
    return ", ".join(parts)


def vocabulary_of(model: PreTrainedModel, stream: ResidualStream) -> Vocabulary:
    embedding, unembedding = (
        layer_of(end).dense()[0]
        for end in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    norm = stream.final_norm
    norm_gain = gain(model.get_submodule(norm), stream.size) if norm else None
    return {"reads": (embedding.t(), None), "writes": (unembedding, norm_gain)}


def named_directions(
    sides: Mapping[str, Mapping[str, Directions]],
    svds: Svds,
    vocabulary: Vocabulary,
    tokenizer: PreTrainedTokenizerBase | None,
    vectors: tuple[Sequence[str], torch.Tensor] | None,  # n, (n, d)
) -> Mapping[str, dict[str, Any]]:
    fields = defaultdict[str, dict[str, Any]](dict)
    for verb, of in sides.items():
        if tokenizer is not None:
            named = near_to(of, *vocabulary[verb], lambda n: str(tokenizer.decode([n])))
            for name, table in named.items():
                fields[name][verb] = table
        if vectors is not None:
            streams = {name: side for name, side in of.items() if not side.of_tokens}
            for name, table in near_to(streams, vectors[1], None, vectors[0].__getitem__).items():
                shares = largest_shares(streams[name], svds[name].s, *vectors)
                fields[name] |= {f"{verb}_vectors": table, f"{verb}_shares": shares}
    return fields


def matrix_figures(site: AdaptedModule, svd: Svd, w: torch.Tensor, full: bool) -> MatrixFigures:
    """The figures of an update, given its SVD and its base weight w (out, in) in fp32."""
    s, rank = svd.s, site.rank
    for_90, for_95, for_99 = (effective_rank(s, share) for share in (0.9, 0.95, 0.99))
    directions = for_95 if rank is None else len(s)
    intruders, positions = in_base_spectrum(w, svd, directions) if full else (None, None)
    return MatrixFigures(
        rank=len(s) if rank is None else rank,
        numerical_rank=len(s),
        effective_rank_90=for_90,
        effective_rank_95=for_95,
        effective_rank_99=for_99,
        factored=rank is not None,
        stable_rank=stable_rank(s),
        entropy_rank=entropy_rank(s),
        base=against_base(svd, w, directions),
        directions=directions,
        shape=list(w.shape),
        singular_values=s.tolist(),
        advice=advice(rank, pooled([s])),
        intruders=intruders,
        positions=positions,
    )


def adapter_figures(sites: Sites) -> AdapterFigures:
    figures = [*sites.values()]
    size, base = (math.hypot(*(getattr(f.base, n) for f in figures)) for n in ("norm", "base_norm"))
    ranks = {f.rank if f.factored else None for f in figures}
    known = [f.base.amplification for f in figures if f.base.amplification is not None]

    ranks_of = ("effective_rank_90", "effective_rank_95", "effective_rank_99")
    means = {
        name: fmean(getattr(f, name) for f in figures)
        for name in (*ranks_of, "stable_rank", "entropy_rank")
    }
    return AdapterFigures(
        sites=len(figures),
        rank=ranks.pop() if len(ranks) == 1 else None,
        **means,
        norm=size,
        relative_norm=size / base if base else None,
        amplification=median(known) if known else None,
        pooled=pooled([torch.tensor(f.singular_values) for f in figures]),
    )


def truncated(site: AdaptedModule, svd: Svd) -> Svd:
    """The SVD, reduced to the top directions if the update is dense, because all SVDs stay in
    memory.
    """
    if site.rank is not None:
        return svd
    top = svd.top(NUM_SHOWN)
    return Svd(top.u.clone(), top.s.clone(), top.v.clone())


def count_unmeasured(adapter: Adapter) -> dict[str, int]:
    """The number of deltas without figures, such as biases, by class."""
    measured = {id(delta) for delta in adapter.own_deltas.values()}
    kinds = Counter(type(p).__name__ for _, p in adapter.parts() if id(p) not in measured)
    return dict(sorted(kinds.items()))
