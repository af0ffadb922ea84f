"""VeRA's projections: one pair an adapter, whatever is done to the model."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lorafold as lf
from lorafold.core.delta import SETTINGS
from noise import moved


def adapted() -> tuple[nn.Sequential, lf.Adapter]:
    torch.manual_seed(0)
    root = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16))
    adapter = lf.attach(root, lf.VeRA(rank=8), ["0", "2"])
    return root, moved(adapter)


def projections(root: nn.Sequential) -> set[int]:
    return {id(root[i].deltas["default"].projections) for i in (0, 2)}


CHANGES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "double": lambda m: copy.deepcopy(m).double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_projections_stay_shared_and_are_no_parameters(change: str) -> None:
    root, adapter = adapted()
    twin = CHANGES[change](root)
    x = torch.randn(3, 24)
    assert len(projections(twin)) == 1
    assert projections(twin) != projections(root)
    assert torch.allclose(twin(x.to(next(twin.parameters()).dtype)).float(), root(x), atol=1e-6)
    assert {n.rsplit(".", 1)[-1] for n, _ in adapter.named_parameters()} == {"d", "b"}
    assert {k.rsplit(".", 1)[-1] for k in adapter.state_dict()} == {"d", "b", SETTINGS}
    shared = root[0].deltas["default"].projections
    assert (tuple(shared.A.shape), tuple(shared.B.shape)) == ((8, 32), (32, 8))
