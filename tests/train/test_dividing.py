"""A model that is divided as it is loaded has few bytes itself, and operations find it whole."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lorafold.models.loading import load_model
from lorafold.models.quantizations import Storage
from lorafold.runtime.processes import Processes
from lorafold.training_step.sharded_data_parallel import Sharded

CPU = torch.device("cpu")


def loaded(shards: Sharded, path: Path, storage: Storage) -> Any:
    with shards.loading(CPU):
        return load_model(path, storage)


def held(model: nn.Module) -> int:
    """The bytes that the model itself has of its parameters."""
    return sum(p.untyped_storage().nbytes() for p in model.parameters())


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Processes]:
    """A process that computes with itself."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield Processes()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "storage", [Storage(torch.float32), Storage(torch.bfloat16), Storage(torch.bfloat16, "nf4")]
)
def test_a_process_keeps_its_part_of_what_is_loaded(storage: Storage, tiny_model_dir) -> None:
    path = tiny_model_dir("llama-wide")
    whole = sum(p.nbytes for p in load_model(path, storage).parameters())
    kept = 0
    for index in range(2):
        shards = Sharded(Processes(index, 2))
        with shards.gathering():
            model = loaded(shards, path, storage)
        kept += sum(shard.kept for shard in shards.shards_by_storage.values())
        assert held(model) < 0.4 * whole
    assert kept + held(model) == pytest.approx(whole, rel=0.05)


def test_operations_find_weights_whole_one_at_a_time(alone: Processes, tiny_model_dir) -> None:
    path = tiny_model_dir("llama-wide")
    plain, shards = load_model(path, torch.float32), Sharded(alone)
    with shards.gathering():
        model = loaded(shards, path, Storage(torch.float32))
        least, largest = held(model), max(p.nbytes for p in model.parameters())
        for added in (0.0, 1.0):
            for p, expected in zip(model.parameters(), plain.parameters(), strict=True):
                assert torch.equal(p, expected + added)
                assert held(model) <= least + largest
                with torch.no_grad():
                    p.mul_(1).add_(1 - added)
        assert torch.equal(model.lm_head.weight.T[3:], plain.lm_head.weight.T[3:] + 1)
    assert held(model) == least
