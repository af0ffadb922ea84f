"""The rewards of completions of held-out prompts, and that a loaded model stays as it is."""

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import lorafold as lf
from conftest import lorafold
from lorafold.core.attach import selection_of
from lorafold.errors import LorafoldError
from lorafold.generation import decode

pytestmark = pytest.mark.usefixtures("unestimated")
WORDS = ("red", "blue", "green", "gold", "grey", "black", "white", "brown")
ROWS = [{"prompt": f"Say {word}", "word": word} for word in WORDS]
FILE = """
def letters(completion, word):
    return sum(letter in completion for letter in word) / len(word)

def short(completion):
    return -len(completion)
"""


def letters(completion: str, word: str) -> float:
    return sum(letter in completion for letter in word) / len(word)


def length(completion: str) -> int:
    return len(completion)


@pytest.fixture(scope="module")
def base(tiny_model_dir, tmp_path_factory) -> Path:
    """A tiny model whose tokens are far from equally likely."""
    out = tmp_path_factory.mktemp("base") / "llama"
    copytree(tiny_model_dir("llama"), out)
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def policy(base: Path, tmp_path_factory) -> tuple[Path, float]:
    """An adapter, and the reward that its run measured on the held-out rows."""
    out = tmp_path_factory.mktemp("policy") / "a"
    recipe = lf.Recipe(
        objective="grpo", steps=4, batch=2, max_length=96, storage="fp32", seed=3, lr=0.01,
        lr_b=0.1, schedule="constant", warmup=0,
        objective_options={"group": 4, "max_new_tokens": 12},
    )  # fmt: skip
    found = lf.train(recipe, model=base, data=ROWS, eval_data=ROWS, rewards=letters, out=out)
    assert found.eval_loss is not None
    return out, -found.eval_loss


def measured(model: Any, data: Any = ROWS, **given: Any) -> Any:
    how = {"storage": "fp32"} if isinstance(model, Path) else {}
    return lf.evaluate(model, data, **{"rewards": letters, "max_new_tokens": 12, **how, **given})


def test_it_is_what_the_run_measured(policy: tuple[Path, float], base: Path, tmp_path) -> None:
    adapter, reward = policy
    own = measured(base, adapters=adapter, seed=3)
    assert own.reward == pytest.approx(reward)
    assert (own.n, own.group, own.groups_without_signal) == (len(ROWS), 1, None)
    loaded = lf.load_model(base, "fp32", "cpu")
    assert measured(loaded, seed=3).reward != own.reward
    lf.load(loaded, adapter)
    assert measured(loaded, seed=3) == own
    assert measured(loaded).reward != own.reward
    (tmp_path / "rewards.py").write_text(FILE)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    asked = ["--data", tmp_path / "rows.jsonl", "--reward", f"{tmp_path}/rewards.py:letters"]
    asked += ["--model", base, "--storage", "fp32", "--device", "cpu", "--max-new-tokens", 12]
    more = ["--reward", f"0.5*{tmp_path}/rewards.py:short", "--seed", "3", "--group", 2, "--json"]
    done = lorafold("eval", str(adapter), *map(str, asked), "--seed", "3")
    assert done.stdout.startswith(f"8 prompts, 1 completion each: reward {own.reward:.4g} (95%: ")
    found = json.loads(lorafold("eval", *map(str, [*asked, *more])).stdout.splitlines()[-1])
    both = found["rewards"].values()
    weighted = sum(w * x["mean"] for w, x in zip((1, 0.5), both, strict=True))
    assert found["reward"] == pytest.approx(weighted)
    assert all(x["interval"][0] < x["mean"] < x["interval"][1] for x in both)
    assert len(found["samples"]) == 6
    assert found["samples"][0]["prompt"] in [row["prompt"] for row in ROWS]


@pytest.mark.parametrize("temperature", [1.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_the_interval_has_the_expected_value(temperature: float, base: Path) -> None:
    """Of a reward of the first token, which follows from the model's softmax; 95% of intervals."""
    model, tokenizer = lf.load_model(base, "fp32", "cpu"), lf.load_tokenizer(str(base))
    talk, how = [{"role": "user", "content": "Say"}], {"return_tensors": "pt", "return_dict": True}
    asked = tokenizer.apply_chat_template(talk, add_generation_prompt=True, **how)
    with torch.no_grad():
        logits = model(**asked).logits[0, -1]
    p = torch.softmax(logits / temperature, -1)
    worth = torch.tensor([float(len(decode(tokenizer, [t]))) for t in range(len(p))])
    expected = float(p @ worth)
    entropy = -float(p @ p.log())
    given: dict[str, Any] = {"rewards": length, "max_new_tokens": 1, "temperature": temperature}
    found = [measured(model, [{"prompt": "Say"}] * 128, seed=n, **given) for n in range(6)]
    assert sum(one.reward_interval[0] < expected < one.reward_interval[1] for one in found) >= 5
    drawn = sum(one.entropy for one in found) / len(found)
    assert drawn == pytest.approx(entropy, rel=0.1)
    flat = float(torch.softmax(logits / (1.5 - temperature), -1) @ worth)
    assert not any(one.reward_interval[0] < flat < one.reward_interval[1] for one in found)
    best = measured(model, [{"prompt": "Say"}], **{**given, "temperature": 0})
    assert (best.reward, best.entropy) == (worth[logits.argmax()], 0)
    assert best.reward_interval is None


def test_samples_go_from_the_best_to_the_worst(base: Path) -> None:
    found = measured(base, group=3)
    rewards = [one.reward for one in found.samples]
    assert rewards == sorted(rewards, reverse=True)
    assert len(rewards) == 6
    seen: list[float] = []

    def watched(completion: str, word: str) -> float:
        seen.append(letters(completion, word))
        return seen[-1]

    assert measured(base, group=3, rewards=watched).reward == found.reward
    assert rewards == sorted(seen, reverse=True)[:3] + sorted(seen, reverse=True)[-3:]
    same = [len({*seen[i : i + 3]}) == 1 for i in range(0, 24, 3)]
    assert found.groups_without_signal == sum(same) / 8
    few = measured(base, ROWS[:2])
    assert len(few.samples) == 2
    assert ("\n...\n" in str(found), "\n...\n" in str(few)) == (True, False)
    assert "row 1, completion 1: 'Say red' -> " in str(few)


def test_a_call_judges_about_64_completions(base: Path) -> None:
    """So its time limit is that of a step, and not of all held-out rows."""
    calls: list[int] = []

    def together(prompts: list[str], completions: list[str]) -> list[int]:
        calls.append(len(completions))
        return [len(text) for text in completions]

    given: dict[str, Any] = {"max_new_tokens": 1, "group": 10}
    found = measured(base, ROWS * 3, rewards=together, **given)
    assert calls == [60] * 4
    assert found.samples == measured(base, ROWS * 3, rewards=length, **given).samples


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_a_loaded_model_stays_as_it_is(storage: str, base: Path, policy: Any) -> None:
    """Also between a forward and its backward, in training mode, under a stack."""
    model = lf.load_model(base, storage, "cpu")
    lf.load(model, policy[0], "below", allow_other_base=storage == "nf4")
    alone = measured(model)
    torch.manual_seed(0)
    top = lf.attach(model, lf.LoRA(rank=2, dropout=0.5), name="top")
    with torch.no_grad():
        for p in top.parameters():
            p.add_(0.3 * torch.randn_like(p))
    model.train()
    before = [(p.requires_grad, p._version) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    loss = model(torch.tensor([[5, 6, 7]])).logits.std()
    stacked = measured(model)
    loss.backward()
    assert stacked == measured(model)
    assert stacked.samples != alone.samples
    with lf.only(model, "below"):
        assert measured(model) == alone
    assert [module.training for module in model.modules()] == modes
    assert selection_of(model).names == ("below", "top")
    assert [(p.requires_grad, p._version) for p in model.parameters()] == before
    assert all(p.grad is not None for p in top.parameters())


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "without rewards": (
        {"rewards": (), "group": 1, "seed": 0, "reward_seconds": 3},
        "^group, seed, reward_seconds: used only for completions that rewards",
    ),
    "the loss alone": ({"completions": False}, "^completions: found False, expected True"),
    "rows of text": ({"data": [{"text": "a"}]}, r"^data: found rows of \{text\}, expected rows wi"),
    "a long prompt": (
        {"data": [*ROWS, {"prompt": "x " * 50, "word": "a"}], "max_length": 64},
        r"^data: row 9: found a prompt of \d+ tokens, expected at most 52|row 9: found a prompt",
    ),
    "no room": ({"max_length": 12}, "^max_new_tokens: found 12, expected at least 1 and less tha"),
    "none of each": ({"group": 0}, "^group: found 0, expected 1 or more"),
    "half of one": ({"group": 1.5}, "^group: found 1.5, expected an integer"),
    "the same again": ({"group": 2, "temperature": 0}, "^group: found 2 at temperature 0, "),
    "too cold": ({"temperature": -1}, "^temperature: found -1, expected 0 or more"),
    "a seed": ({"seed": -1}, "^seed: found -1, expected 0 to 4294967295"),
    "no time": ({"reward_seconds": 0}, "^rewards: found a time limit of 0 s"),
    "time as text": ({"reward_seconds": "3"}, "^reward_seconds: found '3', expected a number"),
    "no reward": ({"rewards": 3}, "^rewards: found 3, expected functions or names"),
    "an unknown one": ({"rewards": "words"}, "^reward 'words': expected FILE.py:fn"),
    "a lost field": (
        {"data": [{"prompt": "a"}]}, "^reward letters: row 1, completion 1: needs the fields word;",
    ),
    "one that fails": (
        {"rewards": lambda completion: 1 / 0}, "^reward <lambda>: row 1, completion 1: raised",
    ),
    "a setting too many": (
        {"allow_other_base": True, "model": None},
        "^allow_other_base: not supported for a",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str, base: Path) -> None:
    given, said = CASES[case]
    model = lf.load_model(base, "fp32", "cpu") if "model" in given else base
    with pytest.raises(LorafoldError, match=said):
        measured(model, **{name: value for name, value in given.items() if name != "model"})


def test_a_classifier_that_is_loaded_draws_nothing(base: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(base)
    with pytest.raises(LorafoldError, match="can't generate text, expected a causal language"):
        measured(model)
