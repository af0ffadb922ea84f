"""Is NF4 information-optimal for the weights of a real model? What 4-bit codes lose, on every
linear of smollm2's blocks and on N(0, 1).

    python benchmarks/quantization_error.py [--no-kl] [--loftq] [--normal 16]

All codes share one scheme, w ~ level[code] * max |w| of a block of 64, and differ in their 16
levels:
    nf4, nf4-double     NormalFloat, with constants in fp32 and with double quantization
    fp4, int4           bitsandbytes' 4-bit float (15 distinct levels), k / 7 for k = -7 .. 7
    equal-use           the blocks' own quantiles as bounds, so that every code is used as often (4
                        bits of entropy); levels are bin means
    lloyd-max           the levels of least squared error for these very weights: no fixed 16 levels
                        have less
    lloyd-max-exact     the least squared error with -1, 0 and 1 among the levels, as NF4 has them
    lloyd-max-normal    those for N(0, 1), on the weights
One JSON object a line, and a table of smollm2's, also written to results/quantization_error.json:
relative_error |W - Q(W)| / |W| over all matrices together, worst_matrix the largest of a single
one, max_error in units of the block's largest weight, entropy of the codes' use in bits,
above_bound the error against lloyd-max's, kl of the model's answers on the probe texts against the
original's (nats per token; both computed in fp32 from bf16 weights). Shifting the blocks of a
code by half a block or mirroring its levels keeps its error and moves kl by 0.01 to 0.04: smaller
differences mean little.

--loftq: LoftQ (Li et al. 2023, arXiv 2310.08659) at rank 16 on NF4 with double quantization. T
times Q = nf4(W - BA), BA = SVD_16(W - Q); relative_error is then |W - Q - BA| / |W|. T = 1 leaves
the base at nf4(W), as any other adapter does; T = 5 gives it a base of its own.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.append(str(Path(__file__).parent.parent / "tests" / "lib"))

import torch
from bitsandbytes.functional import get_4bit_type
from lib.results import keep
from lib.short import parsed
from torch import Tensor, nn

import nf4_reference as nf4
from lorafold.core.targets import all_linear
from lorafold.data.examples import probe_ids
from lorafold.models.loading import load_model
from lorafold.models.tokenizer import load_tokenizer

BINS = 1 << 16  # of the histogram over [-1, 1] in which levels are fitted
RANK = 16


@dataclass(frozen=True)
class Code:
    """Levels, ascending, and the bounds between them: the midpoints, unless others were chosen."""

    level: Tensor
    bound: Tensor
    double: bool = False

    # W quantized and dequantized, in fp32; its codes (elements,)
    def __call__(self, w: Tensor) -> tuple[Tensor, Tensor]:
        x, c = nf4.normalized(w, nf4.BLOCK)
        code = torch.bucketize(x, self.bound, out_int32=True)
        if self.double:
            constants = nf4.quantize(w).constants
            assert isinstance(constants, nf4.BlockConstants)
            c = constants.dense()
        return (self.level[code] * c[:, None]).flatten()[: w.numel()].view(w.shape), code.flatten()[
            : w.numel()
        ]


def nearest(level: Tensor, double: bool = False) -> Code:
    return Code(level, (level[:-1] + level[1:]) / 2, double)


@dataclass(frozen=True)
class Histogram:
    """Of w / max |w|: count, and what least squares in W need, the sums of c^2 and c^2 x, each with
    a 0 in front and cumulated.
    """

    count: Tensor
    mass: Tensor
    moment: Tensor

    def between(self, bound: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of c^2 and c^2 x between bounds; their quotient is the best level there."""
        centre = torch.linspace(-1, 1, BINS, dtype=torch.float64)
        edge = torch.cat(
            [torch.tensor([0]), torch.searchsorted(centre, bound), torch.tensor([BINS])]
        )
        return self.mass[edge].diff(), self.moment[edge].diff()


def histogram(weights: Sequence[Tensor]) -> Histogram:
    sums = torch.zeros(3, BINS, dtype=torch.float64)
    for w in weights:
        x, c = (t.double() for t in nf4.normalized(w, nf4.BLOCK))
        at = ((x + 1) / 2 * (BINS - 1)).round().long().clamp(0, BINS - 1).flatten()
        for total, share in zip(
            sums,
            (torch.ones_like(x), c.square()[:, None].expand_as(x), c.square()[:, None] * x),
            strict=True,
        ):
            total += torch.bincount(at, share.flatten(), BINS)
    return Histogram(*nn.functional.pad(sums.cumsum(1), (1, 0)))


def equal_use(h: Histogram) -> Code:
    wanted = h.count[-1] * torch.arange(1, 16, dtype=torch.float64) / 16
    bound = torch.linspace(-1, 1, BINS, dtype=torch.float64)[
        torch.searchsorted(h.count[1:], wanted)
    ]
    mass, moment = h.between(bound)
    return Code((moment / mass).float(), bound.float())


def lloyd_max(h: Histogram, kept: Sequence[int] = ()) -> Code:
    """Levels and bounds improved in turn until neither moves, NF4's levels `kept` as they are; of
    three starts, the best end.
    """
    ends = []
    for level in (
        nf4.levels().double(),
        torch.linspace(-1, 1, 16, dtype=torch.float64),
        equal_use(h).level.double(),
    ):
        moved = 1.0
        while moved > 1e-7:
            mass, moment = h.between((level[:-1] + level[1:]) / 2)
            new = moment / mass
            new[list(kept)] = nf4.levels()[list(kept)].double()
            moved, level = (new - level).abs().max().item(), new
        mass, moment = h.between((level[:-1] + level[1:]) / 2)
        # the squared error, but for sum c^2 x^2
        ends.append(((mass * level.square() - 2 * moment * level).sum().item(), level))
    return nearest(min(ends, key=lambda end: end[0])[1].float())


def measure(
    weights: Sequence[Tensor],
    quantized: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    put: Sequence[nn.Linear],
) -> dict:
    """What quantizing loses; what comes out is put into the linears, if there are any."""
    error = total = worst = most = 0.0
    use = torch.zeros(16, dtype=torch.float64)
    for i, w in enumerate(weights):
        w = w.float()
        q, code = quantized(w)
        off = w - q
        square, norm = off.square().sum().item(), w.square().sum().item()
        error, total, worst = error + square, total + norm, max(worst, (square / norm) ** 0.5)
        if code is not None:
            largest = off.view(-1, nf4.BLOCK).abs().amax(1) / w.view(-1, nf4.BLOCK).abs().amax(1)
            most, use = max(most, largest.max().item()), use + torch.bincount(code, minlength=16)
        if put:
            put[i].weight.data = q
    row = {"relative_error": (error / total) ** 0.5, "worst_matrix": worst}
    share = use[use > 0] / use.sum()
    return (
        row | {"max_error": most, "entropy": -(share * share.log2()).sum().item()}
        if len(share)
        else row
    )


class Answers:
    """The model's answers on the probe texts, as it was when this was made and as it is now."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.texts = model, probe_ids(load_tokenizer("smollm2"), None)
        self.before = list(self.log_probabilities())

    @torch.inference_mode()
    def log_probabilities(self) -> Iterator[Tensor]:  # each (T, vocabulary)
        for ids in self.texts:
            yield (
                self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            )

    def kl(self) -> float:
        """The mean over tokens of sum_v p log(p / q), p before and q now."""
        total = sum(
            (p.exp() * (p - q)).sum(dtype=torch.float64).item()
            for p, q in zip(self.before, self.log_probabilities(), strict=True)
        )
        return total / sum(map(len, self.texts))


def low_rank(r: Tensor) -> Tensor:
    """The matrix of rank 16 nearest to r (out, in), from the eigenvectors on its shorter side."""
    if r.shape[0] > r.shape[1]:
        return low_rank(r.t()).t()
    u = torch.linalg.eigh(r @ r.t()).eigenvectors[:, -RANK:]
    return u @ (u.t() @ r)


def loftq(w: Tensor, steps: int) -> Tensor:  # Q + BA
    ba = torch.zeros_like(w)
    for _ in range(steps):
        q = nf4.dequantize(nf4.quantize(w - ba), torch.float32)
        ba = low_rank(w - q)
    return q + ba


def shape_of(weights: Sequence[Tensor]) -> dict:
    """How normal they are: fourth moment over the squared second (mean of the matrices), largest
    over RMS (mean of the blocks).
    """
    blocks = [w.float().view(-1, nf4.BLOCK) for w in weights]
    kurtosis = [b.pow(4).mean().item() / b.square().mean().item() ** 2 for b in blocks]
    crest = torch.cat([b.abs().amax(1) / b.square().mean(1).sqrt() for b in blocks])
    return {
        "kurtosis": sum(kurtosis) / len(kurtosis),
        "largest_over_rms": crest.mean().item(),
        "weights": crest.numel() * nf4.BLOCK,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--no-kl", action="store_true", help="weights alone, without the model's answers"
    )
    parser.add_argument("--normal", type=int, default=16, help="millions of numbers from N(0, 1)")
    parser.add_argument("--loftq", action="store_true", help="also LoftQ, T = 1 and T = 5")
    asked = parsed(parser, normal=1, loftq=True)

    model = load_model("smollm2", torch.bfloat16)
    linears = [
        model.get_submodule(path) for path in all_linear(model, lambda m: isinstance(m, nn.Linear))
    ]
    weights = [linear.weight.detach() for linear in linears]  # bf16, kept
    answers = None if asked.no_kl else Answers(model.float())
    table: list[dict] = []
    draw = torch.Generator().manual_seed(0)
    normal = list(torch.randn(asked.normal, 1024, 1024, generator=draw))

    def report(
        data: str, name: str, quantized: Callable, bound: float | None = None, **more: float
    ) -> float:
        real = data == "smollm2"
        row = (
            {"data": data, "code": name}
            | more
            | measure(weights if real else normal, quantized, linears if real and answers else ())
        )
        if bound:
            row["above_bound"] = row["relative_error"] / bound - 1
        if real and answers:
            row["kl"] = answers.kl()
        table.append(row)
        print(json.dumps(row), flush=True)
        return row["relative_error"]

    codes = {
        "nf4": nearest(nf4.levels()),
        "nf4-double": nearest(nf4.levels(), double=True),
        "fp4": nearest(get_4bit_type("fp4", device="cpu").unique()),
        "int4": nearest(torch.arange(-7, 8) / 7),
    }
    for data, matrices in (("normal", normal), ("smollm2", weights)):
        print(json.dumps({"data": data} | shape_of(matrices)), flush=True)
        h = histogram(matrices)
        best = lloyd_max(h)
        bound = report(data, "lloyd-max", best, bits=4.5)
        own = {"lloyd-max-exact": lloyd_max(h, kept=(0, 7, 15)), "equal-use": equal_use(h)}
        for name, code in (codes | own).items():
            report(data, name, code, bound, bits=nf4.bits_per_weight(double=code.double))
        codes["lloyd-max-normal"] = best
    for steps in (1, 5) if asked.loftq else ():
        report("smollm2", f"loftq T={steps}", lambda w, steps=steps: (loftq(w, steps), None))
    keep(
        "quantization_error",
        [row for row in table if row["data"] == "smollm2"],
        dtypes="see the rows",
    )


if __name__ == "__main__":
    main()
