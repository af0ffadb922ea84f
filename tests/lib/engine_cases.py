"""What the engine's tests share: adapters of eight methods on a tiny model, requests, and oracles
that know nothing of the engine: transformers' `generate`, and the sampler's steps with it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import nn
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import lorafold as lf
from lorafold.engine import Ended, Engine, Request, Sampling
from lorafold.engine.adapter_cache import AdapterCache
from lorafold.engine.adapters import LoadedAdapter
from lorafold.engine.kv_cache import BLOCK, BlockCache, num_blocks
from lorafold.engine.model_structure import structure_of
from lorafold.engine.runner import is_planned
from lorafold.engine.sampler import SampledToken, Sampler, sample_tokens

E = TypeVar("E", bound=Engine)
METHODS: dict[str, Any] = {
    "lora": lf.LoRA(rank=4),
    "dora": lf.DoRA(over=lf.LoRA(rank=3)),
    "prompt": lf.Prompt(tokens=3),
    "houlsby": lf.Bottleneck(size=4),
    "ia3": lf.IA3(),
    "loha": lf.LoHa(rank=2),
    "vera": lf.VeRA(rank=16),
    "lokr": lf.LoKr(rank=2),
}


def check(engine: Engine) -> None:
    """Between steps the engine holds what its requests need, and nothing else."""
    running, waiting = engine._scheduler.running, engine._scheduler.waiting
    ids = [row.request.id for row in (*running, *waiting, *engine._inbox)]
    assert sorted(ids) == sorted(engine._rows), "every request waits or runs once"
    assert len({row.slot for row in running}) == len(running) <= engine._runner.slots
    assert all(row.stream.ended is None for row in engine._rows.values())
    assert all(row.prefiller is None or row.prefiller in running for row in running)
    if engine.is_batched:
        check_slots(engine._runner, running)
    check_adapters(engine.adapters)


def check_adapters(adapters: AdapterCache) -> None:
    """References, leases and bytes agree."""
    with adapters._lock:
        for entry in adapters._entries:
            assert 0 <= entry.leases <= entry.references, entry
            assert not entry.leases or entry.loaded, f"{entry}: leased, not resident"
            current = adapters._by_name.get(entry.name) is entry
            assert current or entry.references or entry.future, f"{entry}: left over"
            assert current or not entry.pinned, f"{entry}: pinned without a name"
        assert adapters._by_name.keys() <= {entry.name for entry in adapters._entries}
        assert adapters.budget is None or adapters.nbytes <= adapters.budget, adapters.nbytes


def check_slots(runner: Any, rows: Sequence[Any]) -> None:
    """Each slot has its request's adapter, and the blocks are those of requests and prefixes."""
    assert runner.rows == list(rows)
    plain = [row for row in rows if not is_planned(row) and not row.adapter.separate]
    placed = {row.slot: row.adapter for row in plain}
    assert runner.slot_adapters.placed == placed, "each slot has its request's adapter"
    check_blocks(runner, rows)


def check_blocks(runner: Any, rows: Sequence[Any]) -> None:
    """References are counted, what is shared is full, and other blocks are zero."""
    cache, prefixes = runner.cache, runner.prefixes.prefixes
    tables = [*(row.blocks for row in rows), *(prefix.blocks for prefix in prefixes)]
    used = Counter(block for table in tables for block in table)
    assert cache.references == used
    assert 0 not in used
    assert cache.num_free == cache.capacity - len(used)
    for row in rows:
        assert len(row.blocks) in (num_blocks(len(row.tokens) + n) for n in (-1, 0, 1))
        assert all(cache.references[block] == 1 for block in row.blocks[row.computed // BLOCK :])
    for prefix in prefixes:
        assert len(prefix.blocks) == num_blocks(len(prefix.tokens))
        assert is_finite(cache, prefix.blocks), f"{prefix} is not finite"
    free = [block for block in range(cache._end) if block not in used]
    for pool in (*cache.keys.values(), *cache.values.values()):
        assert not pool[free].any(), "a free block is not zero"


def poison(held: LoadedAdapter) -> None:
    """Makes an adapter's weights NaN."""
    with torch.no_grad():
        for t in held.tensors:
            t.fill_(float("nan"))


def room(model: Any, blocks: int) -> int:
    """The bytes of so many blocks."""
    return blocks * BLOCK * structure_of(model).token_bytes


def is_finite(cache: BlockCache, blocks: Sequence[int]) -> bool:
    """Whether all keys and values in these blocks are finite."""
    pools = (*cache.keys.values(), *cache.values.values())
    return all(bool(pool[list(blocks)].isfinite().all()) for pool in pools)


def evict(adapters: AdapterCache, name: str) -> bool:
    """Evict the adapter of that name as one that needs room would; False if it is in use or pinned.
    """
    with adapters._lock:
        entry = adapters.entry(name)
        evictable = adapters._evictable(entry)
        if evictable:
            entry.loaded = None
            adapters.evictions += 1
            adapters._without_room.clear()
        return evictable


def status(adapters: AdapterCache, name: str) -> str:
    """Where the adapter of a name is."""
    adapters.entry(name)
    return adapters.statuses().get(name, ("cold", 0))[0]


def save_adapters(
    model: nn.Module, directory: Path, specs: Mapping[str, Any], **options: Any
) -> dict[str, Path]:
    """An adapter of each spec, far from its start, in a directory each."""
    paths = {}
    for i, (name, spec) in enumerate(specs.items()):
        torch.manual_seed(i)
        adapter = lf.attach(model, spec, name="saved", **options)
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
        paths[name] = adapter.save(directory / name)
        adapter.detach()
    return paths


def with_large_weights(adapter: Path, numbers: int) -> None:
    """Give an adapter a valid file of one tensor of so many zeros, of which the disk has none."""
    (adapter / "manifest.json").unlink()
    about = {"dtype": "F32", "shape": [4, numbers // 4], "data_offsets": [0, 4 * numbers]}
    header = json.dumps({"base_model.model.model.norm.lora_A.weight": about}).encode()
    with (adapter / "adapter_model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * numbers)


def prompt(n: int, seed: int, vocabulary: int = 300) -> tuple[int, ...]:
    """n random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(vocabulary, (n,), generator=generator).tolist())


def loaded(engine: E, paths: Mapping[str, Path]) -> E:
    """The engine, which has loaded these adapters."""
    for name, path in paths.items():
        engine.load(name, path)
    return engine


def watch(engine: Engine, see: Callable[[Any, Any, torch.Tensor], object]) -> None:
    """Call `see` with the rows, the counts and the logits of each pass."""
    forward = engine._runner.forward

    def watched(rows: Any, counts: Any) -> torch.Tensor:
        logits = forward(rows, counts)
        see(rows, counts, logits)
        return logits

    engine._runner.forward = watched  # type: ignore[method-assign]


@contextmanager
def failing(engine: Engine, when: Callable[[Any, int], bool], error: Exception) -> Iterator[None]:
    """Passes raise an error if `when` holds for one of their rows and its new tokens."""
    forward = engine._runner.forward

    def faulty(rows: Any, counts: Any) -> torch.Tensor:
        if any(when(row, len(row.tokens) - len(row.request.prompt)) for row in rows):
            raise error
        return forward(rows, counts)

    with mock.patch.object(engine._runner, "forward", faulty):
        yield


def logits_of(engine: Engine, request: Request, others: Sequence[Request]) -> list[torch.Tensor]:
    """The logits of each token of a request, with others in the batch, earlier and later ones."""
    seen: list[torch.Tensor] = []

    def see(rows: Any, counts: Any, logits: torch.Tensor) -> None:
        for b, (row, n) in enumerate(zip(rows, counts, strict=True)):
            if row.request.id == request.id and row.num_pending == n:
                seen.append(logits[b].clone())

    watch(engine, see)
    half = len(others) // 2
    streams = [engine.submit(other) for other in others[:half]]
    engine.step()
    streams += [engine.submit(asked) for asked in (request, *others[half:])]
    engine.run()
    assert not any(stream.result().message for stream in streams)
    return [*seen]  # the engine goes on


def same_bits(engine: Engine, request: Request, others: Sequence[Request]) -> None:
    """The logits of a request are, beside others, bit for bit those that it has by itself."""
    alone, beside = logits_of(engine, request, []), logits_of(engine, request, others)
    assert len(alone) == len(beside) == request.max_new_tokens
    assert all(map(torch.equal, alone, beside))


def ended(engine: Engine, request: Request) -> Ended:
    """The end of a request that runs by itself."""
    stream = engine.submit(request)
    engine.run()
    check(engine)
    return stream.result()


def generated(model: Any, request: Request) -> tuple[int, ...]:
    """The greedy tokens by transformers' own `generate`."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor([request.prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
    )
    return tuple(out[0, len(request.prompt) :].tolist())


def expected(model: Any, request: Request, paths: Mapping[str, Path]) -> tuple[int, ...]:
    """The same with the request's adapter attached."""
    if request.adapter is None:
        return generated(model, request)
    adapter = lf.load(model, paths[request.adapter], "expected")
    tokens = generated(model, request)
    adapter.detach()
    return tokens


def alone(
    model: Any, request: Request, paths: Mapping[str, Path], **options: Any
) -> tuple[int, ...]:
    """The tokens of one request in an engine of its own."""
    with Engine(model, **options) as engine:
        if request.adapter:
            engine.load(request.adapter, paths[request.adapter])
        stream = engine.submit(request)
        engine.run()
        return stream.result().tokens


def together(
    engine: Engine, requests: Sequence[Request], steps_between: int = 0
) -> list[tuple[int, ...]]:
    """The tokens of requests that share an engine; each comes some steps after the one before."""
    streams = []
    for request in requests:
        streams.append(engine.submit(request))
        for _ in range(steps_between):
            engine.step()
            check(engine)
    while engine.step():
        check(engine)
    engine.run()
    ended = [stream.result() for stream in streams]
    assert [e.message for e in ended] == [""] * len(ended)
    return [e.tokens for e in ended]


def sampling(i: int) -> Sampling:
    """One of seven settings."""
    return (
        Sampling(),
        Sampling(temperature=0.8, seed=i),
        Sampling(temperature=1.2, top_k=20, seed=i),
        Sampling(temperature=0.9, top_p=0.8, seed=i, logprobs=2),
        Sampling(temperature=1.0, min_p=0.1, seed=i),
        Sampling(repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1),
        Sampling(temperature=0.7, seed=i, logit_bias={i % 300: 2.0}),
    )[i % 7]


def processors(s: Sampling) -> LogitsProcessorList:
    """What transformers makes of the same settings."""
    found: list[Any] = []
    if s.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    if s.temperature:
        found.append(TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        found.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        found.append(TopPLogitsWarper(s.top_p))
    if s.min_p:
        found.append(MinPLogitsWarper(s.min_p))
    return LogitsProcessorList(found)


def choose(sampler: Sampler, logits_V: torch.Tensor) -> SampledToken:
    """The next token of one row."""
    (found,) = sample_tokens([sampler], logits_V[None])
    if isinstance(found, Exception):
        raise found
    return found
