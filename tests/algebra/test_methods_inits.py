"""PiSSA and OLoRA start from the right part of the weight and lose nothing of a small step."""

import pytest
import torch
from torch import nn

import lorafold as lf


def weight() -> torch.Tensor:
    """(96, 64) with a spectrum that falls as those of trained matrices do."""
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(96, 64))[0], torch.linalg.qr(torch.randn(64, 64))[0]
    return u * torch.arange(1, 65).float().rsqrt() @ v


def laid(spec, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, lf.Adapter]:
    root = nn.Sequential(nn.Linear(64, 96, bias=False))
    with torch.no_grad():
        root[0].weight.copy_(weight())
    root.to(dtype)
    return root, lf.attach(root, spec, ["0"])


@pytest.mark.parametrize("niter", [0, 16])
def test_pissa_starts_from_the_largest_singular_parts(niter: int) -> None:
    _, adapter = laid(lf.PiSSA(rank=5, alpha=10, niter=niter))
    delta = adapter.deltas["0"]
    u, s, vt = torch.linalg.svd(weight(), full_matrices=False)
    best = u[:, :5] * s[:5] @ vt[:5]
    assert (2 * delta.B0 @ delta.A0 - best).norm() <= 1e-4 * best.norm()
    assert torch.allclose(delta.B0.norm(dim=0), delta.A0.norm(dim=1), rtol=1e-4)


def test_olora_starts_from_qr() -> None:
    _, adapter = laid(lf.OLoRA(rank=5))
    delta = adapter.deltas["0"]
    assert torch.allclose(delta.B0.t() @ delta.B0, torch.eye(5), atol=1e-5)
    assert torch.allclose(delta.B0 @ delta.B0.t() @ weight(), delta.B0 @ delta.A0, atol=1e-5)


@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize("spec", [lf.PiSSA(rank=5), lf.OLoRA(rank=5)], ids=["pissa", "olora"])
def test_a_first_step_survives_in_bf16(spec) -> None:
    """Only the difference B - B0 can hold it: it is under half a unit of B."""
    root, adapter = laid(spec, torch.bfloat16)
    stored = root.state_dict()["0.weight"]
    assert torch.equal(stored, weight().bfloat16())
    delta = adapter.deltas["0"]
    x = torch.randn(4096, 64).bfloat16()
    with torch.no_grad():
        bare = root(x).double()
        for p in adapter.parameters():
            p.add_(1e-4 * torch.randn_like(p))
        change = x.double() @ delta.delta().double().t()
        exact = x.double() @ stored.double().t() + change
        realised = root(x).double() - (exact - change)
    error = (realised - change).norm() / change.norm() / change.numel() ** 0.5
    assert error < 0.05
    assert bare.isfinite().all()
    assert ((realised * change).sum() / change.square().sum()).item() == pytest.approx(
        1, abs=0.05 + 3 * error.item()
    )


def test_a_rank_beyond_the_matrix_is_refused() -> None:
    told = r"found rank 65 for a matrix \(96, 64\), expected at most 64"
    with pytest.raises(lf.LorafoldError, match=told):
        laid(lf.PiSSA(rank=65))
