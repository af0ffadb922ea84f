"""The figures of `lorafold inspect`, except the loss, for one adapter and its base.

    sites             by module path: the spectrum, the size relative to the base, the tokens; each
                      matrix of experts on its own, as `...gate_up_proj[3]`
    whole             the same over all sites
    layers            phi of the top directions of every two blocks
    experts           phi of the top directions of every two experts of a block
    experts_left_out  which experts have tokens, where there are experts
    heads_left_out    which projections have no heads, where some have none
    against           the comparison with a second adapter
    tokens_left_out   why no site has tokens, where the model has no tokenizer
    advice            conclusions, in sentences

The weights of one matrix of the base at a time are read from its files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lorafold.adapter import Adapter, load
from lorafold.bases import layer_of
from lorafold.core.attach import only
from lorafold.errors import NoTokenizer
from lorafold.inspecting import base_svd, conclusions, reads
from lorafold.inspecting.against import SHOWN, across_experts, across_layers, compared
from lorafold.inspecting.heads import heads_of
from lorafold.inspecting.residual import Stream, gain, stream_of
from lorafold.inspecting.spectra import advice, pooled, spectrum
from lorafold.inspecting.subspaces import against_base
from lorafold.inspecting.updates import Site, Svd, largest, load_below, sites
from lorafold.models.checkpoint import MappedModel
from lorafold.opening import Base
from lorafold.opening.base import check_language_model
from lorafold.peft.saved import Saved

Progress = Callable[[int, int], None]  # sites done, sites in all
Figures = dict[str, Any]
EXPERTS = "Of the experts of a block, the one with the largest update has tables of tokens."
FUSED = (
    "The heads of projections that are one matrix for queries, keys and values are left out: which"
    " rows are whose is not said."
)
WHOLE = (
    "effective_rank_90",
    "effective_rank_95",
    "effective_rank_99",
    "stable_rank",
    "entropy_rank",
)


@torch.no_grad()
def inspect(
    base: Base,
    stack: Sequence[Saved],
    *,
    against: Saved | None = None,
    directions: str | Path | None = None,
    full: bool = False,
    progress: Progress | None = None,
) -> Figures:
    """Measure a saved adapter of any method that folds.

    Args:
        stack: The adapter, after those that it was trained over, lowest first; they are part of its
            base here.
        against: A second adapter to compare with: over the same ones, or one of them.
        directions: A safetensors file of vectors in the residual stream.
        full: Also compare with the spectrum of the base, which takes the SVD of every weight.
        progress: Called as progress(sites done, sites in all).

    Raises LorafoldError as `load`, and for a method that does not change matrices. Without a
    tokenizer the tables of tokens are left out, and `tokens_left_out` says why.
    """
    check_language_model(base, [*stack, *([against] if against is not None else [])])
    *over, saved = stack
    left_out = None
    try:
        tokenizer = base.tokenizer(stack)
    except NoTokenizer as error:
        tokenizer, left_out = None, f"The tables of tokens are left out: {error}."
    mapped, allowed = base.mapped(), base.allow_other_base
    below = load_below(mapped.model, base, stack)
    adapter = load(mapped.model, saved, "inspected", allow_other_base=allowed)
    other = None
    if against is not None:
        with only(mapped.model, *below):
            other = load(mapped.model, against, "against", allow_other_base=allowed)
    stream = stream_of(mapped.model)
    projections, fused = heads_of(mapped.model, stream)
    changed, figures, svds = list(sites(adapter, below)), dict[str, Figures](), dict[str, Svd]()
    for done, site in enumerate(changed, 1):
        weights = site.weights()
        for name, svd in site.parts():
            figures[name] = of_matrix(site, svd, weights[name].float(), full)
            if name in projections:
                figures[name]["heads"] = projections[name].shares(svd)
            svds[name] = kept_of(site, svd)
        if progress is not None:
            progress(done, len(changed))
    vectors = (
        None if directions is None else reads.read_vectors(directions, ends_of(mapped)[0].shape[1])
    )
    chance = {
        "reads": reads.chance(ends_of(mapped)[0], None),
        "writes": reads.chance(ends_of(mapped)[1], final_gain(mapped, stream)),
    }
    shown = {name: svds[name] for name in largest(figures)}
    for at, found in tokens_of(mapped, stream, shown, tokenizer, vectors).items():
        figures[at] |= found
    among = across_experts(svds, stream)
    result: Figures = {
        "adapter": str(saved),
        **({"over": [*map(str, over)]} if over else {}),
        "model": base.name,
        "method": str(adapter.spec),
        "beside": beside(adapter),
        "whole": of_whole(figures),
        "sites": figures,
        "layers": across_layers(svds, stream),
        **({"experts": among, "experts_left_out": EXPERTS} if among else {}),
        **({"heads_left_out": FUSED} if figures.keys() & set(fused) else {}),
        "chance_cosine": chance,
        "tokens_left_out": left_out,
    }
    if against is not None and other is not None:
        others = sites(other, below if other.over else ())
        result["against"] = {
            "adapter": str(against),
            **compared(svds, {n: kept_of(site, svd) for site in others for n, svd in site.parts()}),
        }
    return {**result, "advice": conclusions.sentences(result)}


def of_matrix(site: Site, svd: Svd, w: torch.Tensor, full: bool) -> Figures:
    """The figures of a matrix.

    Args:
        svd: The SVD of its update.
        w: W0, (out, in), in fp32.
        full: Those that need the spectrum of W0 too.
    """
    figures = spectrum(svd.s, site.rank)
    directions = len(svd.s) if figures["factored"] else int(figures["effective_rank_95"])
    found = {**figures, **against_base(svd, w, directions), "directions": directions}
    if full:
        found |= base_svd.figures(w, svd, directions)
    about = {
        "shape": list(w.shape),
        "singular_values": svd.s.tolist(),
        "advice": advice(site.rank, pooled([svd.s])),
    }
    return {**found, **about}


def of_whole(sites: Mapping[str, Figures]) -> Figures:
    """Means and medians over the sites, and the loss of cutting all sites to one rank."""
    size, own = (
        math.hypot(*(site[name] for site in sites.values())) for name in ("norm", "base_norm")
    )
    ranks = {name: fmean(site[name] for site in sites.values()) for name in WHOLE}
    given = {site["rank"] if site["factored"] else None for site in sites.values()}
    known = [site["amplification"] for site in sites.values() if site["amplification"] is not None]
    return {
        "sites": len(sites),
        "rank": given.pop() if len(given) == 1 else None,
        **ranks,
        "norm": size,
        "relative_norm": size / own if own else None,
        "amplification": median(known) if known else None,
        **pooled([torch.tensor(site["singular_values"]) for site in sites.values()]),
    }


def kept_of(site: Site, svd: Svd) -> Svd:
    """The SVD of a dense update cut to its top directions, so that those of all sites fit in
    memory; one of factors is small and stays whole.
    """
    return svd if site.rank is not None else svd.top(SHOWN).copied()


def tokens_of(
    mapped: MappedModel, stream: Stream, svds: Mapping[str, Svd],
    tokenizer: PreTrainedTokenizerBase | None, vectors: tuple[list[str], torch.Tensor] | None,
) -> dict[str, Figures]:  # fmt: skip
    """The tokens and the user's vectors that each module reads and writes, by module path.

    Args:
        mapped: The base.
        stream: The modules of its residual stream.
        svds: The SVD of each module's update.
        tokenizer: Names the tokens; None leaves them out.
        vectors: Names and vectors (n, d), or None.
    """
    model = mapped.model
    reading = {
        path: side
        for path, svd in svds.items()
        if len(svd.s) and (side := reads.reading(model, stream, path, svd))
    }
    writing = {
        path: side
        for path, svd in svds.items()
        if len(svd.s) and (side := reads.writing(stream, path, svd))
    }
    embedding, unembedding = ends_of(mapped)
    found: dict[str, Figures] = {path: {} for path in {**reading, **writing}}
    for verb, sides, vocabulary, through in (
        ("reads", reading, embedding, None),
        ("writes", writing, unembedding, final_gain(mapped, stream)),
    ):
        if tokenizer is not None:
            name = token_of(tokenizer)
            for path, table in reads.tables(sides, vocabulary, through, name).items():
                found[path][verb] = table
        if vectors is not None:
            names, matrix = vectors
            streams = {path: side for path, side in sides.items() if not side.of_tokens}
            for path, table in reads.tables(streams, matrix, None, names.__getitem__).items():
                found[path][f"{verb}_vectors"] = table
                found[path][f"{verb}_shares"] = reads.largest_shares(
                    streams[path], svds[path].s, names, matrix
                )
    return found


def token_of(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    """A function that gives the text of a token id."""
    return lambda number: str(tokenizer.decode([number]))


def final_gain(mapped: MappedModel, stream: Stream) -> torch.Tensor | None:
    """The gain (d,) of the norm between the residual stream and the head, or None without one."""
    if stream.final_norm is None:
        return None
    return gain(mapped.model.get_submodule(stream.final_norm), stream.size)


def ends_of(mapped: MappedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The vectors of the embedding and of the unembedding, (V, d) each."""
    ends = mapped.model.get_input_embeddings(), mapped.model.get_output_embeddings()
    embedding, unembedding = (layer_of(end).dense()[0] for end in ends)
    return embedding.t(), unembedding


def beside(adapter: Adapter) -> dict[str, int]:
    """The number of other deltas of the adapter, by class: biases, whole modules, tokens. They are
    not part of the figures.
    """
    own = {id(delta) for delta in adapter.own_deltas.values()}
    kinds = [type(part).__name__ for _, part in adapter.parts() if id(part) not in own]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}
