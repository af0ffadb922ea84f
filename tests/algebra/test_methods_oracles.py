"""The same numbers as PEFT's and LyCORIS' own layers, once both hold the same tensors."""

import logging
import re
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lorafold as lf
from lorafold.core.spec import Spec
from lorafold.methods.adalora import ranks
from lycoris_cases import lycoris, their_change
from peft_cases import PAIRS
from sequence_cases import GROUPED

IDS = torch.arange(24).view(2, 12) % 32


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**GROUPED | {"vocab_size": 32}))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=32, n_positions=32)
    return GPT2LMHeadModel(config)


MODELS = {"llama": llama, "gpt2": gpt2}
TARGETS = {"llama": ["q_proj", "k_proj", "up_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}

# what a tensor is called there, and here
NAMES = {
    r"lora_A\.default\.weight": "A",
    r"lora_B\.default\.weight": "B",
    r"lora_magnitude_vector\.default\.weight": "magnitude",
    r"lora_A\.default": "Q",
    r"lora_B\.default": "P",
    r"lora_E\.default": "E",
    r"vera_lambda_b\.default": "b",
    r"vera_lambda_d\.default": "d",
    r"(?:hada|lokr)_(w\w+)\.default": r"\1",
    r"ia3_l\.default": "l",
}

CASES: dict[str, tuple[Spec, peft.PeftConfig]] = PAIRS | {
    "vera": (lf.VeRA(rank=8, projection_prng_key=7), peft.VeraConfig(r=8, projection_prng_key=7)),
    "lokr": (lf.LoKr(rank=2, alpha=3), peft.LoKrConfig(r=2, alpha=3)),
    "ia3": (lf.IA3(), peft.IA3Config()),
}


def places(method: str, family: str) -> dict[str, list[str]]:
    if method != "ia3":
        return {"target_modules": TARGETS[family]}
    if family == "gpt2":
        return {}
    names = ["k_proj", "v_proj", "down_proj"]
    return {"target_modules": names, "feedforward_modules": names[2:]}


def peft_model(method: str, family: str) -> peft.PeftModel:
    config = type(CASES[method][1])(**{**CASES[method][1].to_dict(), **places(method, family)})
    if family == "gpt2" and hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(MODELS[family](), config)


def carry_over(theirs: nn.Module, adapter: lf.Adapter) -> None:
    """Random numbers into PEFT's trainable tensors, and the same into ours."""
    generator = torch.Generator().manual_seed(1)
    own = dict(adapter.named_parameters())
    seen = set()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if not p.requires_grad:
                continue
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
            ours = name.removeprefix("base_model.model.")
            for pattern, there in NAMES.items():
                ours = re.sub(rf"{pattern}$", there, ours)
            ours = re.sub(r"\.([AB])$", r".inner.\1", ours) if ours not in own else ours
            own[ours].copy_(p.view(own[ours].shape))
            seen.add(ours)
    assert seen == set(own)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", CASES)
def test_logits_equal_those_of_peft(method: str, family: str) -> None:
    if family == "gpt2" and method.startswith(("loha", "lokr")):
        pytest.skip("PEFT has no LoHa or LoKr for GPT-2's Conv1D")
    theirs = peft_model(method, family).eval()
    model = MODELS[family]().eval()
    with torch.no_grad():
        bare = model(IDS).logits
        adapter = lf.attach(model, CASES[method][0], None if method == "ia3" else TARGETS[family])
        carry_over(theirs, adapter)
        expected, found = theirs(IDS).logits, model(IDS).logits
    assert (found - bare).norm() > 1e-3 * expected.norm()
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_vera_projections_are_those_of_peft() -> None:
    theirs = peft_model("vera", "llama").base_model
    model = llama()
    adapter = lf.attach(model, CASES["vera"][0], TARGETS["llama"])
    for delta in adapter.deltas.values():
        assert torch.equal(delta.projections.A, theirs.vera_A["default"])
        assert torch.equal(delta.projections.B, theirs.vera_B["default"])


def test_dora_gradients_are_those_of_peft() -> None:
    theirs, model = peft_model("dora", "llama").eval(), llama().eval()
    adapter = lf.attach(model, CASES["dora"][0], TARGETS["llama"])
    carry_over(theirs, adapter)
    for m in (theirs, model):
        m(input_ids=IDS, labels=IDS).loss.backward()
    own = dict(adapter.named_parameters())
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            ours = name.removeprefix("base_model.model.")
            ours = ours.replace("lora_magnitude_vector.default.weight", "magnitude")
            ours = re.sub(r"lora_([AB])\.default\.weight", r"inner.\1", ours)
            assert (own[ours].grad - p.grad).norm() <= 1e-5 * p.grad.norm(), name


def test_adalora_trains_and_prunes_as_peft_does() -> None:
    """Steps with the same data and optimizer: the same triplets survive, with the same values."""
    total, torch_lr = 12, 0.05
    schedule = {"tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": total}
    config = peft.AdaLoraConfig(target_r=2, init_r=4, lora_alpha=6, **schedule)
    config.target_modules = set(TARGETS["llama"])
    logging.disable(logging.WARNING)
    theirs = peft.get_peft_model(llama(), config)
    logging.disable(logging.NOTSET)
    model = llama()
    spec = lf.AdaLoRA(rank=2, init_rank=4, alpha=6, tinit=2, tfinal=3, delta_t=2)
    adapter = lf.attach(model, spec, TARGETS["llama"])
    carry_over(theirs, adapter)
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=torch_lr)
        for m in (theirs, model)
    ]
    for step in range(1, total + 1):
        ids = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(step))
        # the whole PeftModel leaves the penalty out
        theirs.base_model(input_ids=ids, labels=ids).loss.backward()
        loss = model(input_ids=ids, labels=ids).loss + spec.penalty(adapter.own_deltas)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        theirs.base_model.update_and_allocate(step)
        spec.after_step(adapter.own_deltas, step, total)
        for optimizer in optimizers:
            optimizer.zero_grad()
    kept = {path: delta.kept.tolist() for path, delta in adapter.deltas.items()}
    pattern = config.rank_pattern.items()
    assert kept == {f"model.{k.split('.lora_E')[0].removeprefix('model.')}": v for k, v in pattern}
    assert sum(ranks(adapter.deltas).values()) == 2 * len(kept)
    assert len(set(ranks(adapter.deltas).values())) > 1
    with torch.no_grad():
        expected, found = theirs(IDS).logits, model(IDS).logits
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr-both"])
def test_matrices_equal_those_of_lycoris(kind: str) -> None:
    torch.manual_seed(0)
    root = nn.Sequential(nn.Linear(64, 128))
    rank, alpha, factor = {"loha": (3, 5, -1), "lokr": (1, 3, 4), "lokr-both": (1, 3, 8)}[kind]
    spec, theirs = lycoris(kind, root[0], rank, alpha, factor)
    delta = lf.attach(root, spec, ["0"]).deltas["0"]
    expected = their_change(theirs, delta, root[0].weight.shape)
    assert (delta.delta() - expected).norm() <= 1e-5 * expected.norm()
