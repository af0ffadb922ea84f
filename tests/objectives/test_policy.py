"""Training a policy: its samples, its loss, resumption, and runs that can't learn."""

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

import lorafold as lf
from interrupted_runs import interrupted
from lorafold.api.arguments import as_rewards
from lorafold.core.attach import only
from lorafold.data.examples import NO_LOSS, Example
from lorafold.data.prompts import TokenizedPrompt
from lorafold.errors import LorafoldError
from lorafold.evaluation.rollouts import Rollouts
from lorafold.files.model_card import JUDGED_BY
from lorafold.objectives.algorithm_options import SamplingOptions, policy_options
from lorafold.objectives.policy import PolicyObjective
from lorafold.training_step.policy_algorithms import (
    Cispo,
    Grpo,
    Gspo,
    PolicyAlgorithm,
    Rloo,
    SampledTokens,
)
from lorafold.training_step.policy_loss import Policy, Rollout
from lorafold.training_step.shared_prefixes import sharing_prefixes
from process_cases import same_bytes

pytestmark = pytest.mark.usefixtures("unestimated")
PROMPTS = ((5, 6, 7), (8, 9, 10, 11), (12,))
GIVEN = [TokenizedPrompt(ids, {"prompt": "ask"}, "row 1") for ids in PROMPTS]
ROWS = [{"prompt": f"Say {word}", "word": word} for word in ("red", "blue", "green", "gold")]


def letters(prompt: str, completion: str, word: str) -> float:
    return sum(letter in completion for letter in word) / len(word)


def huge(completion: str) -> float:
    return 1e30 * len(completion)


def turns(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def asked(**changes: Any) -> lf.Recipe:
    options = {"group": 4, "max_new_tokens": 6, **changes.pop("options", {})}
    given: dict[str, Any] = {"steps": 4, "batch": 2, "max_length": 96, "storage": "fp32"}
    return lf.Recipe(**{"objective": "grpo", **given, **changes}, objective_options=options)


@pytest.fixture
def run(tiny_model_dir, tmp_path: Path) -> Any:
    """Trains a tiny model into the directory of a name."""

    def trained(out: str = "a", recipe: lf.Recipe | None = None, **changes: Any) -> Any:
        given = {"model": tiny_model_dir("llama"), "data": ROWS, "rewards": letters, **changes}
        return lf.train(recipe or asked(), out=tmp_path / out, **given)

    return trained


@pytest.fixture
def told(run) -> Any:
    """Trains likewise, and returns what the run prints."""

    def trained(*arguments: Any, **changes: Any) -> str:
        console = Console(record=True, width=2000)
        run(*arguments, console=console, **changes)
        return console.export_text()

    return trained


@contextmanager
def drawing(model: Any, tokenizer: Any) -> Iterator[Rollouts]:
    rollouts = Rollouts(model, tokenizer, group=3, max_new_tokens=5)
    rollouts.open(prompt=27, slots=4)
    yield rollouts
    rollouts.close()


def rollouts_of(rollouts: Rollouts) -> list[Rollout]:
    generator = torch.Generator().manual_seed(0)
    return [
        Rollout.of(
            [Example(tuple(one.ids), tuple(one.labels)) for one in group], group[0].start,
            [one.logprobs for one in group],
            torch.randn(len(group), generator=generator).tolist(), [True] * len(group),
        )
        for group in rollouts.sample(GIVEN, 0)
    ]  # fmt: skip


def sampled(model: Any, tokenizer: Any) -> list[Rollout]:
    with drawing(model, tokenizer) as rollouts:
        return rollouts_of(rollouts)


@pytest.fixture
def model(tiny_model) -> Any:
    torch.manual_seed(0)
    return tiny_model("llama")


@pytest.fixture
def tokenizer(tiny_model_dir) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir("llama"))


def adapted(model: Any, spec: Any) -> lf.Adapter:
    """An adapter away from its start."""
    torch.manual_seed(1)
    adapter = lf.attach(model, spec, name="it")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return adapter


SPECS = {
    "lora": lf.LoRA(rank=4, dropout=0.0),
    "dora": lf.DoRA(over=lf.LoRA(rank=2, dropout=0.0)),
    "ia3": lf.IA3(),
    "full": lf.Full(),
}


@pytest.mark.parametrize("name", SPECS)
def test_tokens_have_the_log_probabilities_of_transformers(name: str, model, tokenizer) -> None:
    """Of the weights as they are when they are drawn, also after those have changed."""
    adapter = adapted(model, SPECS[name])
    model.train()
    with drawing(model, tokenizer) as rollouts:
        for step in range(2):
            for prompt, group in zip(PROMPTS, rollouts.sample(GIVEN, step), strict=True):
                assert len(group) == 3
                for one in group:
                    ids = torch.tensor([one.ids])
                    logits = model(ids).logits[0, len(prompt) - 1 : -1]
                    expected = torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])
                    assert one.logprobs == pytest.approx(expected[:, 0].tolist(), abs=1e-4)
            model(torch.tensor([PROMPTS[0]])).logits.std().backward()
            # which leaves the versions of parameters as they are
            torch.optim.AdamW(adapter.parameters(), lr=0.1, fused=True).step()
    assert all(p.requires_grad for p in adapter.parameters())


def logps_of(model: Any, e: Rollout, branch: Any) -> torch.Tensor:
    ids = torch.tensor([[*e.shared, *branch.ids]])
    found = torch.log_softmax(model(ids).logits[0, len(e.shared) : -1], -1)
    return found.gather(1, ids[0, len(e.shared) + 1 :, None])[:, 0]


def plain(model: Any, law: PolicyAlgorithm, examples: list[Rollout]) -> torch.Tensor:
    """The loss by its definition, one completion after the other."""
    total = torch.zeros(())
    for e in examples:
        for branch, a in zip(e.branches, e.advantages, strict=True):
            own = logps_of(model, e, branch)
            loss = -a * (own - own.detach()).exp()
            if law.beta:
                with only(model), torch.no_grad():
                    ref = logps_of(model, e, branch)
                k3 = (ref - own).exp() - (ref - own) - 1
                loss = loss + law.beta * (own - own.detach()).exp() * k3
            total = total + loss.sum() / (len(own) if law.average == "per-sequence" else 1)
    return total


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("law", [Grpo(), Grpo(beta=0.5, average="per-sequence")])
def test_loss_and_gradients(law: PolicyAlgorithm, packing: bool, model, tokenizer) -> None:
    adapter = adapted(model, SPECS["lora"])
    examples = sampled(model, tokenizer)
    with sharing_prefixes(model) as how:
        loss = Policy(model, law, how if packing else None, 0, max_new_tokens=5)
        found = loss(**loss.collate(examples, loss.device))
        ours = torch.autograd.grad(found, list(adapter.parameters()))
        figures = loss.figures()
    expected = plain(model, law, examples)
    theirs = torch.autograd.grad(expected, list(adapter.parameters()))
    assert float(found) == pytest.approx(float(expected), abs=1e-4)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)
    assert figures["largest mismatch"] < 1e-4
    assert figures["clipped"] == 0
    assert loss.figures() == {}  # they were of that step


def test_completions_of_other_weights_end_the_run(model, tokenizer) -> None:
    adapter = adapted(model, SPECS["lora"])
    with drawing(model, tokenizer) as rollouts:
        examples = rollouts_of(rollouts)
        with only(model):
            rollouts.names = ()
            rollouts.engine.adopt("policy", [])
        below = rollouts_of(rollouts)
    loss = Policy(model, Grpo(), None, 0, max_new_tokens=5)
    with pytest.raises(LorafoldError, match="sampled by the model without the trained adapter"):
        loss(**loss.collate(below, loss.device))
    with torch.no_grad():
        next(iter(adapter.parameters())).add_(1.0)
    with pytest.raises(LorafoldError, match=r"sampled by other weights \(another step"):
        loss(**loss.collate(examples, loss.device))


def test_rounding_that_is_left_of_an_exact_run_is_said_once(model, tokenizer, caplog) -> None:
    examples = sampled(model, tokenizer)
    loss = Policy(model, Grpo(), None, 0, max_new_tokens=5, exact=True)
    collated = loss.collate(examples, loss.device)
    for _ in range(2):
        loss(**{**collated, "sampled_logps": collated["sampled_logps"] + 1e-5})
        loss.begin(0)
    assert caplog.text.count("exact: sampling and training log-probabilities differ by") == 1


@pytest.mark.parametrize(("updates", "call"), [(1, 2), (3, 7)])
def test_a_run_resumes_exactly(updates: int, call: int, run, tmp_path: Path) -> None:
    options = {"updates": updates, "entropy_floor": 9.0}
    run("whole", asked(options=options))
    recipe = asked(options=options, save_every=1)
    with interrupted(call) as steps:
        run("stopped", recipe)
    assert steps == [n // updates for n in range(call + 1)]
    run("stopped", recipe, resume=True)
    assert same_bytes(tmp_path / "whole", tmp_path / "stopped")


def test_what_a_step_shows(told, tmp_path: Path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("def half(completion):\n    return 0.5\n")
    names = [f"{file}:half", "0.5*regex:.*a.*"]
    text = told(rewards=names, verbose=True)
    for name in ("reward ", f"reward {file}:half 0.5", "cut off", "entropy", "mismatch"):
        assert name in text
    assert "dropout=0.0" in text


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_dropout_of_models_and_of_adapters_is_taken_as_0(
    kind: str, told, tiny_model_dir, tmp_path: Path
) -> None:
    """GPT-2's files have dropout of their own, and the adapter to start from had it."""
    base, start = tiny_model_dir(kind), None
    if kind == "llama":
        start = tmp_path / "sft"
        recipe = lf.Recipe(dropout=0.3, lr=1e-2, steps=2, batch=2, storage="fp32")
        lf.train(recipe, model=base, data=[{"text": "oak and elm"}] * 2, out=start)
    text = told("a", asked(steps=2), model=base, init_adapter=start)
    assert "is set to 0, because sampling uses no dropout" in text


def test_a_policy_may_start_as_its_reference(run) -> None:
    run("a", asked(steps=2, beta=0.1), rewards=lambda completion: 1.0)


def test_first_steps_may_have_nothing_to_learn(run) -> None:
    masked = {"truncated": "masked", "max_new_tokens": 2}
    run("a", asked(steps=2, options=masked))
    with pytest.raises(LorafoldError, match=r"step 10: .* truncated=masked: all completions"):
        run("b", asked(steps=12, options=masked))


def test_rounding_is_that_of_the_base(model) -> None:
    model.bfloat16()
    adapted(model, SPECS["lora"])  # whose factors are in fp32
    assert Policy(model, Grpo(), None, 0, max_new_tokens=5).max_difference == 0.2


class Lengths:
    def __call__(self, completion: str) -> float:
        return len(completion)


def test_an_object_that_judges_is_known_in_another_process() -> None:
    one, other = (PolicyObjective(Grpo(), SamplingOptions(), (Lengths(),)) for _ in range(2))
    assert one.identity == other.identity


def test_weights_are_part_of_the_identity_and_numbers_of_names_are_not() -> None:
    def objective(*weights: float) -> PolicyObjective:
        given = tuple(as_rewards([(weight, letters) for weight in weights]))
        return PolicyObjective(Grpo(), SamplingOptions(), given)

    one = objective(0.5, 2.0)
    before = one.identity
    assert list(one.record()[JUDGED_BY].values()) == [0.5, 2.0]  # numbers the second name
    assert one.identity == before == objective(0.5, 2.0).identity
    assert one.identity != objective(0.5, 3.0).identity


FAILING = """
import pathlib

def size(completion):
    calls = pathlib.Path(__file__).with_name("calls")
    calls.write_text(calls.read_text() + ".")
    return len(completion) / (len(calls.read_text()) != {fails})
"""


@pytest.mark.parametrize("of", ["a step", "held-out rows"])
def test_a_run_whose_reward_fails_is_kept_and_goes_on_with_the_mended_one(
    of: str, told, tmp_path: Path
) -> None:
    """It ends as if nothing had failed, and no checkpoint was due before."""
    judge, calls = tmp_path / "judge.py", tmp_path / "calls"
    held_out, fails = (None, 17) if of == "a step" else (ROWS[:1], 1 + 16 + 1)
    fields = {} if held_out is None else {"eval_every": 2, "save_every": 4}
    recipe = asked(options={"rewards": [f"{judge}:size"]}, **fields)

    def run(out: str, fails: int, **more: Any) -> str:
        judge.write_text(FAILING.replace("{fails}", str(fails)))
        calls.write_text("")
        return told(out, recipe, rewards=(), eval_data=held_out, **more)

    run("whole", 0)
    step = "held-out rows after step 2" if held_out else "step 3"
    where = rf"^{step}: reward .*judge.py:size: row \d, completion 1: raised ZeroDivision"
    with pytest.raises(LorafoldError, match=rf"{where}.*step-000002; to continue .* with --resume"):
        run("failed", fails)
    assert "judge.py:size: changed since the run began; the next" in run("failed", 0, resume=True)
    outs = [tmp_path / of for of in ("whole", "failed")]
    assert same_bytes(*outs)
    records = [json.loads((out / "lorafold.json").read_text()) for out in outs]
    assert records[0]["evals"] == records[1]["evals"]
    assert records[0]["steps"] == records[1]["steps"]


@pytest.mark.parametrize("average", ["per-sequence", "sums"])
def test_a_later_update_of_the_first_step_may_have_all_ratios_clipped(average: str, run) -> None:
    options = {"updates": 4, "average": average, "clip": 1e-6, "clip_high": 1e-6}
    assert run("a", asked(objective="gspo", steps=1, options=options)).steps == 1


SILENT = {
    "solved": (lambda word, step: 9.0, "have the highest reward so far, 9: the rows are solved"),
    "right by chance in some steps": (lambda word, step: 9.0 * (step % 2), "the prompts are too"),
    "out of reach": (lambda word, step: 1 / len(word), "too hard or too easy for the model; try"),
    "no reward applies": (lambda word, step: None, "no completion has a reward, because all"),
}


@pytest.mark.parametrize("case", SILENT)
def test_a_run_without_a_signal_says_so_and_ends_with_its_best_step(
    case: str, run, tmp_path: Path
) -> None:
    """One group with a signal, in step 6, is enough to go on."""
    then, why = SILENT[case]
    calls, held_out = list[str](), iter([0.0, 1.0, 5.0, *[2.0] * 30])

    def judge(completion: str, word: str) -> float | None:
        if word == "held":
            return next(held_out)
        calls.append(completion)
        varies = len(calls) <= 2 * 16 or 6 * 16 - 4 < len(calls) <= 6 * 16
        return len(calls) % 7 if varies else then(word, (len(calls) - 1) // 16)

    console = Console(record=True, width=2000)
    recipe = asked(steps=30, batch=4, eval_every=1, save_every=30)
    held = [{"prompt": "Say", "word": "held"}]
    found = run("a", recipe, rewards=judge, console=console, eval_data=held)
    lines = [line for line in console.export_text().splitlines() if "has a learning signal" in line]
    assert [line.partition(":")[0] for line in lines] == ["step 5", "step 9", "step 16"]
    assert all("of the last 3 steps has a learning signal: " in line for line in lines[:2])
    assert all(why in line for line in lines)
    assert lines[2].endswith("; the run stops")
    assert len(found.losses) == 16
    assert json.loads((tmp_path / "a" / "lorafold.json").read_text())["step"] == 2
    assert len(calls) == 16 * 16


def test_a_policy_that_says_one_thing_is_said_to_have_collapsed(
    tiny_model, tokenizer, told, tmp_path: Path
) -> None:
    model, base = tiny_model("llama"), tmp_path / "base"
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1000)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    text = told("a", asked(steps=3), model=base)
    assert "step 3: no group of the last 3 steps has a learning signal: " in text
    assert "the policy has collapsed; try a lower learning rate" in text


def test_rewards_that_do_not_apply_are_left_out(run, tiny_model_dir, tmp_path: Path) -> None:
    """Each judges some of the rows, and none judges gold."""
    base = tiny_model_dir("llama")

    def warm(completion: str, word: str) -> float | None:
        return len(completion) if word == "red" else None

    def cold(completion: str, word: str) -> float | None:
        return -len(completion) if word in ("blue", "green") else None

    found = run("a", asked(steps=1, batch=4), rewards=[warm, cold], eval_data=ROWS)
    record = json.loads((tmp_path / "a" / "lorafold.json").read_text())
    (warm_one,), (cold_one,) = (record["steps"][f"reward {name}"] for name in ("warm", "cold"))
    assert warm_one > 0 > cold_one
    assert record["steps"]["reward"] == [pytest.approx((warm_one + 2 * cold_one) / 3, rel=1e-5)]
    assert record["steps"]["without a reward"] == [0.25]
    samples = record["samples"]["last"]["samples"]
    assert all(len(one["each"]) == 1 for one in samples)
    assert found.figures["reward"] == pytest.approx(record["held_out"]["reward"][-1], rel=1e-5)
    with pytest.raises(LorafoldError, match="rewards: all returned None for row 1, completion 1"):
        lf.evaluate(base, ROWS[:1], rewards=[cold], max_new_tokens=4)
    worth = lf.evaluate(base, ROWS, rewards=[warm, cold], max_new_tokens=4)
    assert [mean is None for mean in worth.prompt_rewards] == [False, False, False, True]
    assert json.loads(json.dumps(worth.as_json(), allow_nan=False))["n"] == 4


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no reward": ({}, {"rewards": ()}, "objective grpo: found no reward"),
    "a group of one": ({"options": {"group": 1}}, {}, "group: found 1, expected greater than or"),
    "no such option": ({"options": {"grup": 4}}, {}, "grup: .*; it has: beta, .*, group, max_new"),
    "dropout": ({"dropout": 0.1}, {}, "dropout: found 0.1, expected 0"),
    "a method that asks for losses": ({"method": "fish"}, {}, "method: fish chooses the weights"),
    "no function": ({}, {"rewards": 3}, "rewards: found 3, expected functions or names"),
    "a huge reward": ({"objective": "rloo"}, {"rewards": huge}, "advantage of .* at most 1e"),
    "a long prompt": ({"max_length": 12}, {}, r"row 3: found a prompt of \d+ tokens, expected"),
    "a reward of sft": ({"objective": "sft", "options": {}}, {}, "not used by the objective sft"),
    "rows of text": ({}, {"data": [{"text": "a"}]}, "data: found rows of {text}"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str, run, tmp_path: Path) -> None:
    changes, given, said = CASES[case]
    with pytest.raises(LorafoldError, match=said):
        run("a", asked(**changes), **given)
    assert not (tmp_path / "a").exists()


def test_a_finished_run_is_known_by_the_contents_of_its_reward(run, tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text("def size(completion):\n    return len(completion)\n")
    recipe = asked(steps=1, options={"rewards": [f"{judge}:size"]})
    for _ in range(2):
        run("a", recipe, rewards=(), resume=True)
    judge.write_text("def size(completion):\n    return -len(completion)\n")
    with pytest.raises(LorafoldError, match="this run differs: rewards has changed"):
        run("a", recipe, rewards=(), resume=True)


def test_a_policy_is_measured_on_rows_with_answers(run, tiny_model_dir, tmp_path: Path) -> None:
    run("a", asked(steps=1))
    given = {"adapters": tmp_path / "a", "completions": False}
    rows = [{"prompt": "a", "completion": "b"}]
    assert lf.evaluate(tiny_model_dir("llama"), rows, **given).loss > 0
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    assert lf.evaluate(tiny_model_dir("llama"), pairs, **given).preference is not None


LAWS = [Grpo(), Grpo(clip=0.01), Gspo(), Cispo(clip_high=0.01), Rloo(clip=0.9)]


@pytest.mark.parametrize("law", LAWS)
def test_later_updates_have_ratios_to_the_first(law: PolicyAlgorithm, model, tokenizer) -> None:
    """As TRL has it with `num_iterations`: the old log-probabilities are those of the first."""
    adapter = adapted(model, SPECS["lora"])
    examples = sampled(model, tokenizer)
    loss = Policy(model, law, None, 0, max_new_tokens=5)
    loss.begin(0)
    first = [float(loss(**loss.collate([e], loss.device)).detach()) for e in examples]
    with torch.no_grad():
        was = [torch.cat([logps_of(model, e, ids) for ids in e.branches]) for e in examples]
        for p in adapter.parameters():
            p.add_(0.02 * torch.randn_like(p))
    loss.begin(1)
    for e, before, old in zip(examples, first, was, strict=True):
        found = loss(**loss.collate([e], loss.device))
        assert float(found) != pytest.approx(before, abs=1e-6)
        with torch.no_grad():
            logps = [logps_of(model, e, ids) for ids in e.branches]
        of = torch.cat([torch.full((len(x),), i) for i, x in enumerate(logps)])
        advantages = torch.tensor(e.advantages)[of]
        given = SampledTokens(torch.cat(logps), old, None, advantages, of)
        weights = torch.tensor([1 / len(x) if law.average == "per-sequence" else 1 for x in logps])
        expected = float((law.loss(given) * weights[of]).sum())
        assert float(found) == pytest.approx(expected, abs=1e-4)
    figures = loss.figures()
    assert figures["largest mismatch"] < 1e-4  # that of the first update, of the weights that drew
    assert (figures["clipped"] > 0) == (law in (Grpo(clip=0.01), Gspo()))


def test_later_mini_batches_have_ratios_to_sampling(model, tokenizer) -> None:
    adapter = adapted(model, SPECS["lora"])
    first, second = sampled(model, tokenizer)[:2]
    loss = Policy(model, Reinforced(), None, 0, max_new_tokens=5)

    def ratios(e: Rollout) -> list[float]:
        return (loss(**loss.collate([e], loss.device)) / loss.count(e)).tolist()

    loss.begin(0, 0)
    assert ratios(first) == pytest.approx(1)
    old = torch.cat([logps_of(model, first, ids) for ids in first.branches]).detach()
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.02 * torch.randn_like(p))
    now = [torch.cat([logps_of(model, e, ids) for ids in e.branches]) for e in (first, second)]
    drawn = torch.tensor([p for own in second.logprobs for p in own])
    loss.begin(0, 1)
    assert ratios(second) == pytest.approx(float((now[1] - drawn).exp().mean()), abs=1e-4)
    loss.begin(1, 0)
    assert ratios(first) == pytest.approx(float((now[0] - old).exp().mean()), abs=1e-4)
    assert loss.figures()["largest mismatch"] < 1e-4


class Reinforced(PolicyAlgorithm):
    """A loss that is the mean of the importance ratios."""

    def surrogate(self, tokens: SampledTokens) -> torch.Tensor:
        return tokens.ratios


def test_temperature_divides_the_logits(model, tokenizer) -> None:
    e = sampled(model, tokenizer)[0]
    heads = {"linear": model, "capped": capped(model)}
    for head in heads.values():
        loss = Policy(head, Reinforced(), None, 0, max_new_tokens=5, temperature=0.7)
        loss.max_difference = 99.0
        loss(**loss.collate([e], loss.device))
        [(found, _)] = loss.initial_logps[0]
        expected = []
        for branch in e.branches:
            ids = torch.tensor([[*e.shared, *branch.ids]])
            logps = torch.log_softmax(head(ids).logits[0, len(e.shared) : -1] / 0.7, -1)
            expected += logps.gather(1, ids[0, len(e.shared) + 1 :, None])[:, 0].tolist()
        assert found.tolist() == pytest.approx(expected, abs=1e-4)


def capped(model: Any) -> Any:
    """The model with a head that isn't linear."""
    found = copy.deepcopy(model)
    found.lm_head.register_forward_hook(lambda module, given, z: z.tanh())
    return found


def test_the_gradient_of_the_entropy(model, tokenizer) -> None:
    """The mean over all tokens of one position is the gradient of its entropy."""
    adapter = adapted(model, SPECS["lora"])
    prompt = (5, 9, 12)
    p = torch.softmax(model(torch.tensor([prompt])).logits[0, -1], -1)
    entropy = -(p * p.log()).sum()
    expected = torch.autograd.grad(-0.5 * entropy, list(adapter.parameters()), retain_graph=True)
    n = len(p)
    documents = [Example((*prompt, i), (NO_LOSS,) * 3 + (i,)) for i in range(n)]
    rollout = Rollout.of(documents, 3, p.log()[:, None].tolist(), [0.0] * n, [True] * n)
    loss = Policy(model, Grpo(), None, 0, max_new_tokens=5)
    assert not loss.learns(rollout)
    loss.entropy, loss.entropy_weight = float(entropy), 0.5
    assert loss.learns(rollout)
    inputs = loss.collate([rollout], loss.device) | {"weights": p.detach()}
    found = torch.autograd.grad(loss(**inputs), list(adapter.parameters()))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-6)


def test_the_weight_of_the_entropy_grows_below_its_floor(run, tmp_path: Path) -> None:
    run("low", asked(options={"entropy_floor": 99.0}))
    assert lf.history(tmp_path / "low").steps["entropy weight"] == [0.005, 0.01, 0.015, 0.02]
    run("high", asked(options={"entropy_floor": 1e-9}))
    assert lf.history(tmp_path / "high").steps["entropy weight"] == [0.0] * 4


def test_overlong_completions_cost_a_penalty(run, tmp_path: Path) -> None:
    run("a", asked(options={"overlong": 6}), rewards=lambda completion: len(completion))
    steps = lf.history(tmp_path / "a").steps
    lengths = [-n / 6 for n in steps["tokens a completion"]]
    assert steps["reward overlong"] == pytest.approx(lengths)
    for n, environment in ((7, None), (1, [letters])):
        with pytest.raises(LorafoldError, match=f"overlong: found {n}, expected at most"):
            run("b", asked(options={"overlong": n}), environment=environment)


def test_mini_batches_update_the_weights_one_after_another(run, tmp_path: Path) -> None:
    with interrupted(4) as steps:
        run("a", asked(options={"mini_batches": 2, "updates": 2}))
    assert steps == [0, 0, 0, 0, 1]
    assert options_of(fill=3).dynamic_sampling == 3
    with pytest.raises(LorafoldError, match="fill: the objective grpo has no such option"):
        options_of(fill=3, dynamic_sampling=2)
    with pytest.raises(LorafoldError, match="mini_batches: found 3, expected at most batch=2"):
        run("b", asked(options={"mini_batches": 3}))
    assert not (tmp_path / "b").exists()


def options_of(**options: Any) -> SamplingOptions:
    return policy_options("grpo", None, options)[1]


def test_groups_from_which_nothing_is_learned_are_drawn_again(told) -> None:
    seen: list[str] = []

    def rare(completion: str, word: str) -> float:
        seen.append(word)
        return float(completion.startswith(tuple("aeiou"))) if word == "red" else 1.0

    text = told("a", asked(steps=2, batch=4, options={"dynamic_sampling": 2}), rewards=rare)
    counts = {word: seen.count(word) for word in ("red", "blue", "green", "gold")}
    # three groups that are always alike are drawn three times in each of two steps
    assert counts == {"red": counts["red"]} | dict.fromkeys(("blue", "green", "gold"), 24)
    assert counts["red"] in (8, 12, 16, 20, 24)
    assert "groups drawn again" in text


def test_rewards_that_never_vary_end_a_run_that_was_resumed_too(run) -> None:
    asks, calls = asked(steps=12, save_every=1), list[str]()

    def one(completion: str) -> float:
        calls.append(completion)
        if len(calls) == 5 * 8 + 1:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        run("a", asks, rewards=one)
    told = r"step 10: .* of the last 10 steps .*row \d, completion 1: .* has 1"
    with pytest.raises(LorafoldError, match=told):
        run("a", asks, rewards=one, resume=True)


ALPACA = {"instruction": "Say a colour", "input": "a warm one", "output": "red"}
ANSWERED: dict[str, tuple[dict[str, Any], Any, str | None]] = {
    "a prompt": ({"prompt": "Say"}, "Say", None),
    "its completion": ({"prompt": "Say", "completion": "red"}, "Say", "red"),
    "an answer of its own": ({"prompt": "Say", "completion": "red", "answer": "7"}, "Say", "7"),
    "messages": ({"messages": turns("Say", "red")}, turns("Say"), "red"),
    "no answer": ({"messages": turns("Say")}, turns("Say"), None),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Say"}, {"from": "gpt", "value": "red"}]},
        turns("Say"), "red",
    ),
    "Alpaca": (ALPACA, turns("Say a colour\na warm one"), "red"),
    "a preference": ({"prompt": "Say", "chosen": "red", "rejected": "no"}, "Say", "red"),
}  # fmt: skip


@pytest.mark.parametrize("case", ANSWERED)
def test_rewards_get_the_prompt_without_the_answer_and_the_answer(case: str) -> None:
    row, prompt, answer = ANSWERED[case]
    found = TokenizedPrompt((1,), row, "row 1")
    assert found.question == prompt
    assert found.other_fields.get("answer") == answer


def test_long_prompts_are_refused_or_left_out(run, told, tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "Say it again. " * 40, "word": "it"}]
    with pytest.raises(LorafoldError, match="drop such prompts \\(long_prompts=dropped\\)"):
        run("a", asked(), data=rows)
    recipe = asked(options={"long_prompts": "dropped"})
    said = told("left", recipe, data=rows)
    assert "4 prompts; the longest has" in said
    assert "left out 1 longer than 90 tokens" in said
    run("without", asked(), data=ROWS)
    assert same_bytes(tmp_path / "left", tmp_path / "without")


def test_a_run_says_what_history_would_say(told) -> None:
    said = told("a", asked(steps=8, options={"max_new_tokens": 2}))
    found = [line for line in said.splitlines() if "were cut off at max_new_tokens=2" in line]
    assert len(found) == 1  # once
    assert re.search(r"step [6-8]: \d+% of the completions of the last 3 steps were cut", found[0])
