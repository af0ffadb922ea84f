"""VeRA: one pair of frozen random projections for the whole adapter, and two learned vectors for
each matrix.

    y = W x + diag(b) B[:out] diag(d) A[:, :in] drop(x)     A (r, in), B (out, r) frozen; b (out,)
                                                            zero, d (r,) 0.1 at start

Kopiczko et al. 2024, arXiv 2310.11454, eq. 2. VeRA has r + out parameters per matrix instead of
LoRA's r (out + in), so it suits serving very many adapters on one base. The large rank (256) costs
time. A and B fit the largest input and output of the adapted matrices. They are sampled from a
kaiming-uniform distribution with a CPU generator seeded by `projection_prng_key`, A first, which
gives PEFT's values bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafold.core.delta import DeltasByPath, Factors, LowRank
from lorafold.core.layer import Layer, add
from lorafold.core.spec import Spec
from lorafold.methods.common.options_and_init import check, zeros
from lorafold.ops.frozen import scaled_product


class Projections(nn.Module):
    """The frozen projections A (r, in) and B (out, r), fp32. Adapter files contain them if `saved`
    is true.

    All deltas of an adapter on one device have the same Projections module, so that `.to`, deepcopy
    and pickle keep it shared.
    """

    setting_names = ("key",)  # the seed of A and B
    A: Tensor
    B: Tensor

    def __init__(
        self, out: int, inn: int, rank: int, key: int, saved: bool, device: torch.device
    ) -> None:
        super().__init__()
        self.saved, self.key = saved, key
        generator = torch.Generator("cpu").manual_seed(key)
        for name, shape in {"A": (rank, inn), "B": (out, rank)}.items():
            # kaiming-uniform: gain sqrt(2) times sqrt(3), divided by the square root of the fan-in
            bound = (6 / shape[1]) ** 0.5
            values = torch.empty(shape, dtype=torch.float32).uniform_(
                -bound, bound, generator=generator
            )
            self.register_buffer(name, values.to(device), persistent=False)


class VeRADelta(LowRank):
    """The vectors d (*matrices, r) and b (*matrices, out), fp32. `VeRA.join` sets the projections.
    """

    vector_names = ("d", "b")
    projections: Projections

    def __init__(self, layer: Layer, rank: int, d_initial: float, dropout: float) -> None:
        super().__init__(dropout)
        self.shape, matrices, device = layer.shape, layer.matrices, layer.device
        d = torch.full((*matrices, rank), d_initial, device=device, dtype=torch.float32)
        self.d = nn.Parameter(d)
        self.b = zeros((*matrices, self.shape[0]), device)

    def factors(self) -> Factors:
        out, inn = self.shape
        return (
            self.b[..., None] * self.projections.B[:out],
            self.d[..., None] * self.projections.A[:, :inn],
        )

    def forward(self, layer: Layer, x: Tensor, onto: Tensor | None = None) -> Tensor:
        if (self.training and self.dropout) or layer.matrices or not layer.takes_vectors:
            return super().forward(layer, x, onto)
        u = layer.op_once(x, self.projections.A)  # shared by all matrices that read x
        small = scaled_product(u, self.projections.B[: self.shape[0]], self.b, self.d)
        return layer(x, onto=add(small, onto))


@dataclass(frozen=True)
class VeRA(Spec):
    """VeRA: learned vectors that scale shared random projections.

    Args:
        rank: the rank r of the projections.
        dropout: the dropout probability on the branch.
        d_initial: the value of d at start.
        projection_prng_key: the seed of the projections.
        save_projection: save the projections with the adapter, so that its files do not depend on
            torch's random generator.
    """

    rank: int = 256
    dropout: float = 0.0
    d_initial: float = 0.1
    projection_prng_key: int = 0
    save_projection: bool = True

    lr = 2e-2

    def __post_init__(self) -> None:
        check(self, whole=("rank",), below_one=("dropout",))

    def build(self, layer: Layer) -> VeRADelta:
        return VeRADelta(layer, self.rank, self.d_initial, self.dropout)

    def join(self, deltas: DeltasByPath) -> None:
        adapted: list[VeRADelta] = list(deltas.values())  # type: ignore[arg-type]
        out, inn = (max(delta.shape[i] for delta in adapted) for i in (0, 1))
        by_device = {}
        for delta in adapted:
            # sampled even if the parameters are on the meta device, since files may lack them
            device = torch.device("cpu") if delta.b.is_meta else delta.b.device
            if device not in by_device:
                by_device[device] = Projections(
                    out, inn, self.rank, self.projection_prng_key, self.save_projection, device
                )
            delta.projections = by_device[device]
