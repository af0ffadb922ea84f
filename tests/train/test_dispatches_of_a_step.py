"""How many operations and copies a block of a training step may dispatch."""

from collections import Counter
from typing import Any

import pytest
import torch
import transformers as tf
from torch.utils._python_dispatch import TorchDispatchMode

import lorafold as lf
from lorafold.data.batches import collate
from lorafold.data.examples import Example
from lorafold.training_step.fused_modules import fused
from lorafold.training_step.lm_head_loss import labelled_loss
from lorafold.training_step.packed_attention import packed

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 97}  # fmt: skip
COPIES = {"aten._to_copy.default", "aten.copy_.default", "aten.clone.default"}
VIEWS = ("view", "t", "transpose", "permute", "slice", "select", "split", "unsqueeze", "expand",
         "detach", "alias", "unbind", "as_strided", "_unsafe_view", "_reshape_alias")  # fmt: skip
# operations and copies of one block, forward and backward; before the operators in C++ 232 and 56,
# 258 and 67, 442 and 91
BUDGETS = {
    "lora": (lf.LoRA(rank=4, dropout=0.0), 144, 28),
    "lora-dropout": (lf.LoRA(rank=4, dropout=0.05), 163, 32),
    "dora": (lf.DoRA(lf.LoRA(rank=4, dropout=0.0)), 277, 42),
}


class Counted(TorchDispatchMode):
    """Counts what is dispatched, by name, but views, which compute nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).split(".")[1] not in VIEWS:
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def step(spec: Any, blocks: int) -> Counter[str]:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_hidden_layers=blocks)).bfloat16()
    adapter = lf.attach(model, spec)
    rows = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(1)).tolist()
    batch = collate([Example(tuple(r), tuple(r)) for r in rows], packed=True, pad_id=0)
    labels = batch.pop("labels")
    model.train()
    with packed(model) as apart, fused(model):
        assert apart

        def run() -> None:
            labelled_loss(model, labels, batch)[0].backward()
            for p in adapter.parameters():
                p.grad = None

        run()
        with Counted() as counted:
            run()
    return counted.calls


@pytest.mark.parametrize("name", BUDGETS)
def test_a_block_dispatches_no_more_than_its_budget(name: str, each_form: str) -> None:
    if each_form == "plain":
        pytest.skip("the budget is that of the native form")
    spec, operations, copies = BUDGETS[name]
    one, two = (step(spec, blocks) for blocks in (1, 2))
    block = two - one
    assert block.total() <= operations
    assert sum(block[c] for c in COPIES) <= copies
