"""What bf16 costs in precision: the model's forward, an adapter over it that is not merged, and
attention alone.

    python benchmarks/precision.py [--rows 12] [--seed 0]

The embedded model on rows of the quickstart's task; all errors are of computing in bf16 with the
very weights, factors and inputs that the exact side has. model: against fp32, transformers' eager
and sdpa attention (each row alone) beside lorafold's parts, of which training has both. adapter:
LoRA of rank 16, alpha 32, in plain inference against the same in fp32; PEFT reads it from disk. Its
B is random, N(0, size^2), or what AdamW's first step on these rows would make it, -size
sign(gradient). `gain` is by how much it lowers the loss against the bare base in the same dtype.
attention: on queries, keys and values of every layer, forward and backward, against `reference_ops`
in float64; the least possible is one rounding of that.

Errors of tensors are relative norms; the loss is the mean over labelled tokens, in nats, and
`per_token` the root mean square of its error at each. One JSON object a line, then tables.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parent.parent / "tests" / "lib"))

import torch
import torch.nn.functional as F
from lib.results import keep
from lib.short import parsed
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.models.llama.modeling_llama import eager_attention_forward

import lorafold as lf
import reference_ops as reference
from lorafold.data.batches import collate, num_targets
from lorafold.data.examples import Example, encode
from lorafold.models.loading import load_model
from lorafold.models.tokenizer import load_tokenizer
from lorafold.objectives.sft import Sft
from lorafold.ops.attention import document_attention
from lorafold.ops.packed_documents import Documents
from lorafold.quickstart.task import rows
from lorafold.training_step.fused_modules import fused
from lorafold.training_step.losses import CompletionLoss
from lorafold.training_step.packed_attention import attend, document_mask, packed

# B, and its size
ADAPTERS = (
    ("random", 1e-4),
    ("random", 1e-3),
    ("random", 1e-2),
    ("step", 1e-5),
    ("step", 5e-5),
    ("step", 2e-4),
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Layer(NamedTuple):
    """What one layer's attention reads, bf16: q (T, H, D), k and v (T, Hk, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    docs: Documents
    scale: float


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@torch.no_grad()
def alone(model: nn.Module, examples: Sequence[Example]) -> Tensor:  # (T, V), T the tokens of all
    return torch.cat(
        [
            model(input_ids=torch.tensor([e.ids]), use_cache=False).logits[0].float()
            for e in examples
        ]
    )


@torch.no_grad()
def together(model: nn.Module, examples: Sequence[Example]) -> Tensor:  # (T, V)
    inputs = collate(examples, True, 0)
    return (
        model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False)
        .logits[0]
        .float()
    )


def errors(found: Tensor, exact: Tensor, targets: Tensor) -> dict[str, float]:
    """Of logits (T, V), targets (T,) or -100."""
    gap = F.cross_entropy(found, targets, reduction="none") - F.cross_entropy(
        exact, targets, reduction="none"
    )
    gap = gap[targets != -100].double()
    kl = (
        F.kl_div(found.log_softmax(-1), exact.log_softmax(-1), reduction="none", log_target=True)
        .sum(-1)
        .mean()
    )
    return {
        "logits": relative(found, exact),
        "kl": float(kl),
        "loss": float(gap.mean()),
        "per_token": float(gap.square().mean().sqrt()),
    }


def of_model(exact: Tensor, examples: Sequence[Example], targets: Tensor) -> Iterator[dict]:
    for attention in ("eager", "sdpa"):
        model = load_model("smollm2", torch.bfloat16)
        model.set_attn_implementation(attention)
        yield {
            "path": f"transformers, {attention}",
            **errors(alone(model, examples), exact, targets),
        }
    model.requires_grad_(False)  # trained weights are not fused
    with fused(model) as fast:
        assert fast.fast == fast.blocks
        yield {"path": "fused, sdpa", **errors(alone(model, examples), exact, targets)}
    with packed(model) as apart:
        assert apart
        yield {"path": "packed", **errors(together(model, examples), exact, targets)}
    with fused(model.train()), packed(model) as apart:
        assert apart
        found = errors(together(model, examples), exact, targets)
        loss = CompletionLoss(model, True, 0)
        trained = float(loss(**loss.collate(examples, torch.device("cpu")))) / sum(
            map(num_targets, examples)
        )
        yield {
            "path": "fused and packed",
            **found,
            "trained_loss": trained - float(F.cross_entropy(exact, targets)),
        }


def ups(adapter: lf.Adapter) -> list[nn.Parameter]:
    return [p for name, p in adapter.named_parameters() if name.endswith("B")]


def adapted(dtype: torch.dtype, seed: int) -> tuple[nn.Module, lf.Adapter]:
    model = load_model("smollm2", torch.bfloat16).to(dtype)
    torch.manual_seed(seed)
    adapter = lf.attach(model, lf.LoRA(rank=16, alpha=32, dropout=0.0))
    return model.eval(), adapter


def directions(examples: Sequence[Example], seed: int) -> dict[str, list[Tensor]]:
    """What every B is a multiple of, by kind."""
    model, adapter = adapted(torch.float32, seed)
    loss = CompletionLoss(model, False, 0)
    loss(**loss.collate(examples, torch.device("cpu"))).backward()
    return {
        "random": [torch.randn_like(p) for p in ups(adapter)],
        "step": [-p.grad.sign() for p in ups(adapter)],
    }


def of_adapter(
    bases: dict[str, Tensor], examples: Sequence[Example], targets: Tensor, seed: int
) -> Iterator[dict]:
    """`bases`: the bare base's logits in fp32 and in bf16, by plain forward."""
    from peft import PeftModel

    before = {dtype: float(F.cross_entropy(logits, targets)) for dtype, logits in bases.items()}
    lines = directions(examples, seed)
    for kind, size in ADAPTERS:
        own = {dtype: adapted(d, seed) for dtype, d in DTYPES.items()}
        for _, adapter in own.values():
            for p, line in zip(ups(adapter), lines[kind], strict=True):
                p.data.copy_(size * line)
        with tempfile.TemporaryDirectory() as folder:
            own["fp32"][1].save(Path(folder) / "adapter")
            peft = {
                dtype: (
                    PeftModel.from_pretrained(
                        load_model("smollm2", torch.bfloat16).to(d), Path(folder) / "adapter"
                    ).eval()
                )
                for dtype, d in DTYPES.items()
            }
        exact = alone(own["fp32"][0], examples)
        gain = before["fp32"] - float(F.cross_entropy(exact, targets))
        for by, dtype, model in (
            ("lorafold", "bf16", own["bf16"][0]),
            ("PEFT", "bf16", peft["bf16"]),
            ("PEFT", "fp32", peft["fp32"]),
        ):
            found = alone(model, examples)
            row = {
                "B": kind,
                "size": size,
                "by": by,
                "in": dtype,
                "change_over_logits": relative(exact, bases["fp32"]),
            }
            gained = before[dtype] - float(F.cross_entropy(found, targets))
            yield {**row, **errors(found, exact, targets), "gain": gained, "gain_in_fp32": gain}


@contextmanager
def caught(model: nn.Module) -> Iterator[list[Layer]]:
    """What each layer's attention reads from now on."""
    layers: list[Layer] = []

    def catch(
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Documents,
        scaling: float,
        **protocol: Any,
    ) -> Any:
        rows = [x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v)]
        layers.append(Layer(rows[0], rows[1], rows[2], mask, scaling))
        return attend(module, q, k, v, mask, scaling=scaling, **protocol)

    AttentionInterface.register("caught", catch)
    AttentionMaskInterface.register("caught", document_mask)
    model.set_attn_implementation("caught")
    yield layers


def by_document(layer: Layer, attention: Attention) -> Attention:
    """attention: q (1, H, t, D), k and v (1, Hk, t, D) of one document -> (1, t, H, D)."""

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(
            *(x.transpose(0, 1)[None].split(list(layer.docs.lens), 2) for x in (q, k, v)),
            strict=True,
        )
        return torch.cat([attention(*part)[0] for part in parts])

    return whole


def eager(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    mask = torch.full((q.shape[2], q.shape[2]), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)[
        None, None
    ]
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
    return eager_attention_forward(module, q, k, v, mask, scale)[0]


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=True
    ).transpose(1, 2)


def with_gradients(attention: Attention, g: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attention(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, g.to(out.dtype))


def of_attention(layers: Sequence[Layer], seed: int) -> Iterator[dict]:
    found: dict[str, list[list[float]]] = {}
    for number, layer in enumerate(layers):
        _, _, _, docs, scale = layer
        g = torch.randn(
            layer.q.shape, generator=torch.Generator().manual_seed(seed + number)
        ).bfloat16()
        ways: dict[str, Attention] = {
            "lorafold": lambda q, k, v, docs=docs, scale=scale: document_attention(
                q, k, v, docs, scale
            ),
            "transformers, eager": by_document(
                layer, lambda q, k, v, scale=scale: eager(q, k, v, scale)
            ),
            "torch, sdpa": by_document(layer, lambda q, k, v, scale=scale: sdpa(q, k, v, scale)),
        }
        exact = with_gradients(
            lambda q, k, v, docs=docs, scale=scale: reference.document_attention(
                q, k, v, docs, scale
            ),
            g,
            *(x.double() for x in layer[:3]),
        )
        answers = {way: with_gradients(attention, g, *layer[:3]) for way, attention in ways.items()}
        answers["rounded once"] = tuple(x.bfloat16() for x in exact)
        for way, parts in answers.items():
            found.setdefault(way, []).append(
                [relative(a, e) for a, e in zip(parts, exact, strict=True)]
            )
    for way, by_layer in found.items():
        out, gq, gk, gv = (float(x) for x in torch.tensor(by_layer).mean(0))
        worst = float(torch.tensor(by_layer)[:, 0].max())
        yield {
            "attention": way,
            "out": out,
            "out_worst_layer": worst,
            "grad_q": gq,
            "grad_k": gk,
            "grad_v": gv,
        }


def shown(part: str, lines: Iterator[dict]) -> list[dict]:
    kept = []
    for line in lines:
        kept.append(line)
        print(json.dumps({"part": part, **line}), flush=True)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=12, help="of the task")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the rows, the adapter and the gradients of attention's output",
    )
    asked = parsed(parser, rows=2)
    tokenizer = load_tokenizer("smollm2")
    Sft().set_up(tokenizer)
    examples = encode(rows("test", asked.rows, asked.seed), tokenizer, 1024).examples
    inputs = collate(examples, True, 0)
    targets = inputs["labels"][0]
    print(
        json.dumps({"tokens": len(targets), "labelled": int((targets != -100).sum())}), flush=True
    )
    bases = {"fp32": alone(load_model("smollm2", torch.bfloat16).float(), examples)}
    tables = [shown("model", of_model(bases["fp32"], examples, targets))]
    bases["bf16"] = alone(load_model("smollm2", torch.bfloat16), examples)
    bare = {
        "B": "none",
        "size": 0.0,
        "by": "the bare base",
        "in": "bf16",
        "change_over_logits": 0.0,
    }
    bare |= errors(bases["bf16"], bases["fp32"], targets)
    tables.append(shown("adapter", chain([bare], of_adapter(bases, examples, targets, asked.seed))))
    with ExitStack() as stack, torch.no_grad():
        model = load_model("smollm2", torch.bfloat16)
        layers = stack.enter_context(caught(model))
        model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False)
    tables.append(shown("attention", of_attention(layers, asked.seed)))
    keep("precision", *tables, dtypes="see the rows")


if __name__ == "__main__":
    main()
