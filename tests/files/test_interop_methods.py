"""Files of the other methods both ways with PEFT: what one writes the other reads, and the logits
agree (as test_interop_peft for LoRA).
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import lorafold as lf
from lorafold.core.spec import Spec
from peft_cases import CLOSE, gap, logits, move, save_theirs

Model = Callable[[str], Any]

Q = ["q_proj", "v_proj", "up_proj"]
KVD = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}

# (model, our spec, our targets, PEFT's config)
CASES: dict[str, tuple[str, Spec, Any, peft.PeftConfig]] = {
    "dora": (
        "llama",
        lf.DoRA(lf.LoRA(rank=4, alpha=6)),
        Q,
        peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=Q),
    ),
    "dora-biases": (
        "qwen2",
        lf.DoRA(lf.LoRA(rank=4)),
        Q,
        peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=Q),
    ),
    "dora-conv1d": (
        "gpt2",
        lf.DoRA(lf.LoRA(rank=4)),
        ["c_attn"],
        peft.LoraConfig(
            r=4, lora_alpha=8, use_dora=True, target_modules=["c_attn"], fan_in_fan_out=True
        ),
    ),
    "dora-embedding": (
        "llama",
        lf.DoRA(lf.LoRA(rank=4)),
        ["embed_tokens", "q_proj"],
        peft.LoraConfig(
            r=4, lora_alpha=8, use_dora=True, target_modules=["embed_tokens", "q_proj"]
        ),
    ),
    "adalora": (
        "llama",
        lf.AdaLoRA(rank=3, init_rank=4, alpha=6),
        Q,
        peft.AdaLoraConfig(target_r=3, init_r=4, lora_alpha=6, total_step=10, target_modules=Q),
    ),
    "vera": (
        "llama",
        lf.VeRA(rank=8, projection_prng_key=3),
        Q,
        peft.VeraConfig(r=8, projection_prng_key=3, target_modules=Q),
    ),
    "vera-seeded": (
        "llama",
        lf.VeRA(rank=8, projection_prng_key=3, save_projection=False),
        Q,
        peft.VeraConfig(r=8, projection_prng_key=3, save_projection=False, target_modules=Q),
    ),
    "vera-conv1d": (
        "gpt2",
        lf.VeRA(rank=8),
        ["c_attn", "c_fc"],
        peft.VeraConfig(r=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    ),
    "loha": ("llama", lf.LoHa(rank=3, alpha=5), Q, peft.LoHaConfig(r=3, alpha=5, target_modules=Q)),
    "lokr": ("llama", lf.LoKr(rank=2, alpha=3), Q, peft.LoKrConfig(r=2, alpha=3, target_modules=Q)),
    "lokr-whole": (
        "llama",
        lf.LoKr(rank=8, alpha=3),
        Q,
        peft.LoKrConfig(r=8, alpha=3, target_modules=Q),
    ),
    "lokr-both": (
        "llama",
        lf.LoKr(rank=1, decompose_both=True, decompose_factor=8),
        Q,
        peft.LoKrConfig(r=1, alpha=1, decompose_both=True, decompose_factor=8, target_modules=Q),
    ),
    "ia3": ("llama", lf.IA3(), None, peft.IA3Config(**KVD)),
    "ia3-conv1d": (
        "gpt2",
        lf.IA3(),
        None,
        peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
    ),
    "ia3-outputs": (
        "llama",
        lf.IA3(feedforward=[]),
        ["v_proj"],
        peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
    ),
}


@pytest.fixture(autouse=True)
def _seeded_and_quiet() -> None:
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")


def ours(case: str, model: Any) -> lf.Adapter:
    _, spec, targets, _ = CASES[case]
    adapter = lf.attach(model, spec, targets)
    move(adapter.parameters())
    return adapter


def theirs(case: str, model: Any) -> Any:
    config = CASES[case][3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(
            model, type(config)(**{**config.to_dict(), "task_type": "CAUSAL_LM"})
        )
    move(p for p in wrapped.parameters() if p.requires_grad)
    return wrapped


def load_theirs(model: Any, path: Path) -> Any:
    """PEFT's reading, in which a warning of missing or unexpected keys or unknown config fields is
    an error.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message in (
            "is_gradient_checkpointing", "tie_word_embeddings", "fan_in_fan_out",
            "Specified to not",  # save and load VeRA's projections: that is what was asked
            # AdaLoRA's, which are no patterns; LoRA's check meets them all the same
            "rank_pattern keys did not match",
        ):  # fmt: skip
            warnings.filterwarnings("ignore", message=f".*{message}.*")
        return peft.PeftModel.from_pretrained(model, path)


@pytest.mark.few(8)
@pytest.mark.parametrize("case", CASES)
def test_peft_reads_ours(case: str, tiny_model: Model, tmp_path: Path) -> None:
    model = tiny_model(CASES[case][0])
    bare = logits(model)
    adapter = ours(case, model)
    expected = logits(model)
    assert gap(expected, bare) > 100 * CLOSE
    adapter.save(tmp_path / "a")
    assert gap(logits(load_theirs(tiny_model(CASES[case][0]), tmp_path / "a")), expected) < CLOSE


@pytest.mark.few(8)
@pytest.mark.parametrize("case", CASES)
def test_ours_reads_peft(case: str, tiny_model: Model, tmp_path: Path) -> None:
    wrapped = theirs(case, tiny_model(CASES[case][0]))
    expected = logits(wrapped)
    save_theirs(wrapped, tmp_path / "a")
    model = tiny_model(CASES[case][0])
    bare = logits(model)
    adapter = lf.load(model, tmp_path / "a")
    assert gap(expected, bare) > 100 * CLOSE
    assert gap(logits(model), expected) < CLOSE
    adapter.detach()
    assert torch.equal(logits(model), bare)


@pytest.mark.few(8)
@pytest.mark.parametrize("case", CASES)
def test_keys_and_config_as_peft_writes_them(case: str, tiny_model: Model, tmp_path: Path) -> None:
    kind = CASES[case][0]
    ours(case, tiny_model(kind)).save(tmp_path / "ours")
    save_theirs(theirs(case, tiny_model(kind)), tmp_path / "theirs")
    a, b = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs"))
    assert {k: v.shape for k, v in a.items()} == {
        k: v.shape for k, v in b.items() if not k.endswith("base_layer.weight")
    }
    mine, his = (
        json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("ours", "theirs")
    )
    # the same modules in other words, and alpha where the default differs
    ways = {"target_modules", "feedforward_modules", "lora_dropout", "total_step"}
    assert {k: v for k, v in mine.items() if k not in ways} == {
        k: v for k, v in his.items() if k in mine and k not in ways
    }


ROUND = {name: (case[0], case[1], case[2]) for name, case in CASES.items()} | {
    "dora-loha": ("llama", lf.DoRA(lf.LoHa(rank=3)), Q),
    "dora-lokr": ("llama", lf.DoRA(lf.LoKr(rank=2)), Q),
    "dora-vera": ("llama", lf.DoRA(lf.VeRA(rank=8)), Q),
    "dora-adalora": ("llama", lf.DoRA(lf.AdaLoRA(rank=3)), Q),
}


@pytest.mark.few(8)
@pytest.mark.parametrize("case", ROUND)
def test_saved_again_is_the_same(case: str, tiny_model: Model, tmp_path: Path) -> None:
    kind, spec, targets = ROUND[case]
    model = tiny_model(kind)
    adapter = lf.attach(model, spec, targets)
    move(adapter.parameters())
    adapter.save(tmp_path / "a")
    again = tiny_model(kind)
    loaded = lf.load(again, tmp_path / "a")
    loaded.save(tmp_path / "b")
    assert torch.equal(logits(again), logits(model))
    assert type(loaded.spec) is type(spec)
    a, b = (load_file(tmp_path / d / "adapter_model.safetensors") for d in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    configs = [json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in "ab"]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    "spec", [lf.PiSSA(rank=3, alpha=5), lf.OLoRA(rank=3)], ids=["pissa", "olora"]
)
@pytest.mark.parametrize("over", [False, True], ids=["plain", "dora"])
def test_inits_become_lora_of_twice_the_rank(
    spec: Spec, over: bool, tiny_model: Model, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    adapter = lf.attach(model, lf.DoRA(spec) if over else spec, Q)
    move(adapter.parameters())
    adapter.save(tmp_path / "a")
    assert gap(logits(load_theirs(tiny_model("llama"), tmp_path / "a")), logits(model)) < CLOSE
    again = tiny_model("llama")
    loaded = lf.load(again, tmp_path / "a")
    inner = loaded.spec.over if over else loaded.spec
    assert (type(inner), inner.rank) == (lf.LoRA, 6)
    assert gap(logits(again), logits(model)) < CLOSE


def trained(model: Any, adapter: lf.Adapter, spec: lf.AdaLoRA, steps: int) -> None:
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
    for step in range(1, steps + 1):
        ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        spec.after_step(adapter.own_deltas, step, steps)
        optimizer.zero_grad()


def test_pruned_ranks_are_pruned_in_the_file(tiny_model: Model, tmp_path: Path) -> None:
    spec = lf.AdaLoRA(rank=1, init_rank=4, tinit=2, tfinal=2)
    model = tiny_model("llama")
    adapter = lf.attach(model, spec, Q)
    trained(model, adapter, spec, 10)
    expected = logits(model)
    kept = {path: int(delta.kept.sum()) for path, delta in adapter.deltas.items()}
    assert 0 < sum(kept.values()) == len(kept)
    assert len(set(kept.values())) > 1
    adapter.save(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for path, rank in kept.items():
        assert tensors[f"base_model.model.{path}.lora_E"].shape == (rank, 1)
        assert tensors[f"base_model.model.{path}.lora_B"].shape[1] == rank
    again = tiny_model("llama")
    loaded = lf.load(again, tmp_path / "a", trainable=True)
    assert gap(logits(again), expected) < CLOSE
    assert gap(logits(load_theirs(tiny_model("llama"), tmp_path / "a")), expected) < CLOSE
    loaded.save(tmp_path / "b")
    assert gap(logits(load_theirs(tiny_model("llama"), tmp_path / "b")), expected) < CLOSE
    again.train()
    trained(again, loaded, loaded.spec, 5)  # goes on from what was kept


def test_ours_reads_what_peft_pruned(tiny_model: Model, tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(
        target_r=1,
        init_r=4,
        tinit=2,
        tfinal=2,
        total_step=10,
        target_modules=Q,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(tiny_model("llama"), config)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    for step in range(1, 11):
        ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(step))
        wrapped.base_model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        wrapped.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    expected = logits(wrapped)
    save_theirs(wrapped, tmp_path / "a")
    model = tiny_model("llama")
    lf.load(model, tmp_path / "a")
    assert gap(logits(model), expected) < CLOSE
