"""Methods compared as policies: by rewards of held-out prompts, beside the base, in pairs."""

import html
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import lorafold as lf
from command_cases import rows_file, words
from conftest import lorafold, refused
from lorafold.comparing import measure as module
from lorafold.comparing import report, run
from lorafold.comparing.measure import BASE, Measurement, Variant, measure
from lorafold.comparing.paired_tests import Difference, distinguished_pairs, over_base, verdict
from lorafold.comparing.report import Comparison, Quality, figures, markdown, page, short_report
from lorafold.errors import LorafoldError
from lorafold.evaluation.intervals import student
from lorafold.methods import METHODS, make_spec
from lorafold.recipe.resolve_settings import spec_of

pytestmark = pytest.mark.usefixtures("unestimated")
WORDS = ("red", "blue", "green", "gold", "grey", "black", "white", "brown")
ROWS = [{"prompt": f"Say {word}", "word": word} for word in WORDS]
TRAIN, HELD_OUT = ROWS[:4], ROWS[4:]
FILE = """
def letters(completion, word):
    return sum(letter in completion for letter in word) / len(word)

def short(completion):
    return -len(completion)
"""
RECIPE = lf.Recipe(
    objective="grpo", steps=2, batch=2, max_length=64, storage="fp32", lr=0.05, lr_b=0.5,
    schedule="constant", warmup=0, objective_options={"group": 2, "max_new_tokens": 6},
)  # fmt: skip


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    file = tmp_path / "rewards.py"
    file.write_text(FILE)
    return file


def compared(out: Path, model: Path, **given: Any) -> Comparison:
    how: dict[str, Any] = {"data": TRAIN, "eval_data": HELD_OUT, "recipe": RECIPE, "device": "cpu"}
    return lf.compare(out, model=model, **{**how, "methods": ["lora", "ia3"], **given})


@pytest.mark.slow
def test_rows_are_what_training_and_evaluating_alone_give(
    tiny_model_dir, rewards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept as long as the file of the reward is the same."""
    model, out = tiny_model_dir("llama"), tmp_path / "compared"
    asked = [f"{rewards}:letters", f"0.01*{rewards}:short"]
    monkeypatch.setattr(run, "measure_in_process", measure)  # a process takes seconds to start
    monkeypatch.setattr(module, "NUM_ROUNDS", 1)
    found = compared(out, model, rewards=asked)
    base, lora, ia3 = found.rows
    assert (base.method, lora.method, ia3.method) == (BASE, "lora", "ia3")
    how: dict[str, Any] = {"rewards": asked, "max_new_tokens": 6, "group": 2, "max_length": 64}
    how |= {"storage": "fp32", "device": "cpu"}
    alone = lf.evaluate(model, HELD_OUT, **how)
    assert (base.reward, base.reward_interval) == (alone.reward, alone.reward_interval)
    assert base.prompt_rewards == alone.prompt_rewards
    assert base.rewards == {name: one.mean for name, one in alone.rewards.items()}
    how_trained: dict[str, Any] = {"data": TRAIN, "model": model, "device": "cpu"}
    trained = lf.train(RECIPE, out=tmp_path / "a", rewards=asked, **how_trained)
    alone = lf.evaluate(model, HELD_OUT, adapters=tmp_path / "a", **how)
    assert (lora.reward, lora.prompt_rewards) == (alone.reward, alone.prompt_rewards)
    assert lora.prompt_rewards != base.prompt_rewards
    assert lora.trainable_parameters == trained.trainable_parameters
    assert base.trainable_parameters is base.peak_bytes is base.mergeable is None
    assert lora.loss is lora.exact_match is None

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(run, "measure_in_process", never)
    assert compared(out, model, rewards=asked) == found
    with rewards.open("a") as file:
        file.write("# another file\n")
    with pytest.raises(AssertionError):
        compared(out, model, rewards=asked)
    text = (out / "table.md").read_text()
    assert text == str(found)
    assert figures(found.rows)[0][:6] == [
        "method", "trainable", "share", "adapter MB", "seconds", "tokens/s"
    ]  # fmt: skip
    names = {*figures(found.rows)[0]}
    assert {"reward", "reward 95%", "over base", f"reward {rewards}:short"} <= names
    assert not {"loss", "exact"} & names


@pytest.mark.slow
def test_the_command_has_the_same(tiny_model_dir, rewards: Path, tmp_path: Path) -> None:
    rows = rows_file(tmp_path / "rows.jsonl", ROWS * 3)
    done = lorafold(
        "compare", "--model", str(tiny_model_dir("llama")), "--data", str(rows), "--out",
        str(tmp_path / "c"), "--methods", "lora,ia3", "--objective", "rloo", "--reward",
        f"{rewards}:letters", "--objective-options", "group=2", "--objective-options",
        "max_new_tokens=6", "--steps", "2", "--batch", "2", "--max-length", "64", "--storage",
        "fp32", "--device", "cpu", "--seeds", "2", "--html", str(tmp_path / "page.html"), "--json",
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert [row["method"] for row in found["rows"]] == [BASE] * 2 + ["lora"] * 2 + ["ia3"] * 2
    assert {*found["over_base"]} == {"lora", "ia3"}
    assert "no verdict" in found["verdict"]
    assert "1/6 base: reward" in done.stderr
    shown = " ".join((tmp_path / "page.html").read_text().split())
    assert shown.count("<svg") == 5
    assert f"<li>{html.escape(found['verdict'])}.</li>" in shown
    assert "held-out reward (higher is better)" in shown
    assert "oss and exact match" not in shown
    assert "held-out loss" not in shown


@pytest.mark.slow
def test_a_reward_model_scores_what_is_compared(tiny_model_dir, tmp_path, monkeypatch) -> None:
    model, scored = tiny_model_dir("llama"), tmp_path / "reward"
    pairs = [{"prompt": f"Say {w}", "chosen": w, "rejected": w[::-1]} for w in WORDS]
    recipe = lf.Recipe(objective="reward", steps=2, batch=2, max_length=64, storage="fp32", lr=0.1)
    lf.train(recipe, data=pairs, model=model, out=scored, device="cpu")
    monkeypatch.setattr(run, "measure_in_process", measure)
    found = compared(tmp_path / "c", model, rewards=f"adapter:{scored}", methods=["lora"])
    base, lora = found.rows
    assert base.reward != lora.reward
    again = compared(tmp_path / "c", model, rewards=f"adapter:{scored}", methods=["lora"])
    assert again == found
    other = recipe.model_copy(update={"seed": 1})
    lf.train(other, data=pairs, model=model, out=scored, device="cpu", overwrite=True)
    anew = compared(tmp_path / "c", model, rewards=f"adapter:{scored}", methods=["lora"])
    assert anew.rows[0].reward != base.reward


class Asking(lf.LoRA):
    """A method that asks for losses, and does not say so."""

    def prepare(self, deltas: Any, losses: Any) -> None:
        next(losses(1))


class Looking(lf.LoRA):
    def prepare(self, deltas: Any, losses: Any) -> None:
        assert deltas


def test_a_method_says_whether_it_asks_for_losses(tiny_model_dir, tmp_path, monkeypatch) -> None:
    words = {m: make_spec(m).asks_losses for m in METHODS}
    assert {m for m, asks in words.items() if asks} == {"lt-sft", "fish"}
    for method, over in (("fish", {}), ("dora", {"over": "fish"})):
        recipe = RECIPE.model_copy(update={"method": method, "options": over})
        with pytest.raises(LorafoldError, match=f"method: found {method}, which chooses"):
            spec_of(recipe)
    how: dict[str, Any] = {"data": TRAIN, "model": tiny_model_dir("llama"), "rewards": letters}
    monkeypatch.setitem(METHODS, "looking", Looking)
    monkeypatch.setitem(METHODS, "asking", Asking)
    short = RECIPE.model_copy(update={"steps": 1, "method": "looking"})
    assert lf.train(short, out=tmp_path / "a", **how).steps == 1
    with pytest.raises(LorafoldError, match="method asking: prepare uses losses of rows, which"):
        lf.train(short.model_copy(update={"method": "asking"}), out=tmp_path / "b", **how)


def letters(completion: str, word: str) -> float:
    return sum(letter in completion for letter in word) / len(word)


def policy(method: str, *rewards: float, seed: int = 0) -> Measurement:
    return Measurement(
        method, seed, 10, 0.1, reward=fmean(rewards), prompt_rewards=rewards, forgetting_kl=0.1,
        mergeable=True, prefill_attached=1.0,
    )  # fmt: skip


HARD = (0.1, 0.5, 0.9)  # of three prompts
BEFORE = policy(BASE, *HARD)
BETTER = policy("lora", *(x + gain for x, gain in zip(HARD, (0.05, 0.06, 0.07), strict=True)))
SAME = policy("ia3", *(x + gain for x, gain in zip(HARD, (-0.1, 0.0, 0.1), strict=True)))


def thrice(*lines: Measurement) -> list[Measurement]:
    """The same figures under three seeds, so that seeds vary by nothing."""
    return [replace(line, seed=seed) for line in lines for seed in range(3)]


def test_a_difference_is_of_prompts_in_pairs() -> None:
    gain = over_base([BEFORE, BETTER])["lora"]
    half = student(3) * stdev((0.05, 0.06, 0.07)) / 3**0.5
    assert gain.mean == pytest.approx(0.06)
    assert gain.interval == pytest.approx((0.06 - half, 0.06 + half))
    assert gain.interval[0] > 0
    assert over_base(thrice(BEFORE, BETTER))["lora"].interval == pytest.approx(gain.interval)
    one = Difference.of([policy("lora", 1.0)], [policy(BASE, 0.0)])
    assert (one.mean, one.interval, one.p) == (1.0, None, 1.0)  # one prompt says nothing
    two = [BEFORE, replace(BEFORE, seed=1), BETTER, policy("lora", 0.1, 0.5, 0.9, seed=1)]
    assert over_base(two)["lora"].mean == pytest.approx(0.03)


def test_a_method_that_forgets_nothing_has_its_place_on_a_logarithmic_axis() -> None:
    none = [replace(one, forgetting_kl=0.0) for one in (BETTER, SAME)]
    assert "forgets 0.000001 nats per token" in "".join(report.plots_of([BEFORE, *none]))


WORSE = policy("ia3", *(x - gain for x, gain in zip(HARD, (0.05, 0.06, 0.07), strict=True)))


def test_the_best_is_named_where_the_prompts_tell_it_from_all_others() -> None:
    told = verdict(thrice(BEFORE, WORSE, BETTER))
    assert told == (
        "highest held-out reward: lora, +0.06 (95%: +0.03516 to +0.08484) compared with the base,"
        " paired by prompts, over 3 seeds"
    )
    both = thrice(BEFORE, BETTER)
    assert markdown(both).endswith(f"\n\n{verdict(both)}\n")
    tie = verdict(thrice(BEFORE, SAME, BETTER))
    assert tie.startswith("no best method: lora has the highest held-out reward, but is ")
    ends = "than ia3, paired by prompts, over 3 seeds; not significantly better than the base: ia3"
    assert tie.endswith(ends)
    alone = verdict(thrice(BEFORE, SAME))
    assert alone.endswith("by prompts, over 3 seeds; not significantly better than the base")


def losses(method: str, *rows: float) -> Measurement:
    tokens = (10, 40, 10, 40)
    units = tuple((row * n, n) for row, n in zip(rows, tokens, strict=True))
    loss = sum(s for s, _ in units) / sum(tokens)
    return Measurement(
        method, 0, 10, loss=loss, row_losses=units, exact_match=0.5, train_seconds=1.0
    )


def test_losses_are_compared_in_pairs_too() -> None:
    base, lora = losses(BASE, 1, 2, 3, 4), losses("lora", 0.5, 1.5, 2.5, 3.4)
    same = losses("ia3", 0.4, 1.6, 2.4, 3.5)
    assert over_base([base, lora])["lora"].mean == pytest.approx(-0.54)
    assert verdict(thrice(base, lora)).startswith("lowest held-out loss: lora, -0.54 (95%: ")
    assert verdict(thrice(base, lora)).endswith("with the base, paired by rows, over 3 seeds")
    tie = verdict(thrice(base, lora, same))
    assert tie.startswith("no best method: ")
    assert "is not significantly better than" in tie
    assert "the base" not in tie  # both are below it
    worse = losses("dora", 1.5, 2.5, 3.5, 4.4)
    assert verdict(thrice(base, worse)).endswith("; not significantly better than the base")
    assert figures([base, lora])[0] == [
        "method", "trainable", "seconds", "loss", "loss 95%", "over base", "exact"
    ]  # fmt: skip
    assert (verdict([lora]), over_base([lora])) == ("", {})


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_give_no_verdict(seeds: int, tmp_path: Path) -> None:
    rows = [one for one in thrice(BEFORE, WORSE, BETTER) if one.seed < seeds]
    said = f"{seeds} seed{'s' * (seeds > 1)}: no verdict (3 needed)"
    more = "run the same command with --seeds 3, which reuses these results"
    assert verdict(rows) == f"{said}; {more}"
    page(rows, "Methods", tmp_path / "page.html")
    shown = (short_report(rows), markdown(rows), (tmp_path / "page.html").read_text())
    assert all(said in text and "best method" not in text for text in shown)
    assert not any("highest held-out reward: " in text for text in shown)
    assert "Intervals cover prompts only, not seeds." in " ".join(shown[0].split())
    assert Comparison(tuple(rows), "model", "rows").as_json()["verdict"].startswith(said)


# The loss of a row in nats per token, as six seeds of LoRA had it on 60 other rows after 24 steps
# of 4 rows of the quickstart's task (`smollm2`, fp32): its mean, and the standard deviations of a
# row, of a seed, and of a row under a seed. By rows alone 4 of the 10 splits of these seeds into
# three and three were told apart.
MEAN, OF_ROWS, OF_SEEDS, OF_BOTH = 0.0356, 0.0301, 0.0115, 0.0492


def drawn(chance: Any, names: Sequence[str], seeds: int, gain: float = 0.0) -> list[Measurement]:
    """Runs of one method under several names, with other seeds of the same rows; a gain is that of
    the last one.
    """
    rows, tokens = chance.normal(MEAN, OF_ROWS, 60), chance.integers(17, 33, 60)
    found = []
    for name in names:
        rows_of = rows - gain * (name == names[-1]) + chance.normal(0, OF_BOTH, (seeds, 60))
        for seed, values in enumerate(rows_of + chance.normal(0, OF_SEEDS, (seeds, 1))):
            sums = zip((values * tokens).tolist(), tokens.tolist(), strict=True)
            found.append(Measurement(name, seed, loss=0.0, row_losses=tuple(sums)))
    return found


@pytest.mark.parametrize(("seeds", "power"), [(3, 0.5), (5, 0.85), (10, 0.97)])
def test_one_method_under_other_seeds_is_not_told_from_itself(seeds: int, power: float) -> None:
    """At most 16 of 200 times, and a difference of 0.04 nats per token is seen."""
    chance = np.random.default_rng(seeds)
    told = [len(distinguished_pairs(drawn(chance, "ab", seeds))) for _ in range(200)]
    assert sum(told) <= 16
    told = [len(distinguished_pairs(drawn(chance, "ab", seeds, 0.04))) for _ in range(100)]
    assert sum(told) >= 100 * power


def test_many_lines_of_one_method_are_not_told_apart_either() -> None:
    chance = np.random.default_rng(0)
    told = [bool(distinguished_pairs(drawn(chance, "abcde", 3))) for _ in range(100)]
    assert sum(told) <= 8


def test_what_decides_fits_a_terminal_whole() -> None:
    rows = [BEFORE, BETTER, policy("linear-probe", -1234.5, 17.25, 99.75)]
    many = [replace(row, peak_bytes=int(12.5e9), train_seconds=12345.0) for row in rows]
    base, lora = losses(BASE, 1, 2, 3, 4), losses("lora", 0.5, 1.5, 2.5, 3.4)
    for of in (many, [base, lora], [lora, replace(lora, seed=1)]):
        shown = short_report(of)
        assert max(map(len, shown.splitlines())) <= 80
        assert "…" not in shown
    assert "12.50  12,345" in short_report(many)
    assert "-0.5400 ±" in short_report([base, lora])
    assert "Means over 2 seeds." in short_report([lora, replace(lora, seed=1)])
    head = short_report([base, lora]).split("---")[0].split()
    assert head == ["method", "loss", "over", "base", "exact", "time", "trained", "s"]


def test_up_is_the_reward_in_plots() -> None:
    quality = Quality.of([BEFORE, BETTER, SAME])
    assert quality.label == "held-out reward (higher is better)"
    assert (quality.scale, quality.base) == ("linear", BEFORE.reward)  # rewards may be below 0
    assert quality.values == [BETTER.reward, SAME.reward]
    loss = Quality.of([losses("lora", 1, 2, 3, 4)])
    assert (loss.label, loss.base) == ("held-out loss (lower is better)", None)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no reward": ({}, "objective grpo: found no reward"),
    "a function": ({"rewards": len}, "rewards: found <built-in .*, expected names such as"),
    "an objective that takes none": (
        {"rewards": "regex:a", "recipe": lf.Recipe()}, "not used by the objective sft; choose",
    ),
    "a method that asks for losses": (
        {"rewards": "regex:a", "methods": ["lora", "fish"]}, "method: found fish, which chooses",
    ),
    "a reward of no form": ({"rewards": "nosuch"}, "reward 'nosuch': expected FILE.py:fn, "),
    "no such file": ({"rewards": "nosuch.py:fn"}, "reward nosuch.py:fn: there is no file"),
    "no regular expression": ({"rewards": "regex:("}, r"reward regex:\(: not a regular"),
    "no such reward model": ({"rewards": "adapter:a"}, "a: found no adapter_config.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, tiny_model_dir, tmp_path: Path) -> None:
    given, said = BAD[case]
    with pytest.raises(LorafoldError, match=said):
        compared(tmp_path / "c", tiny_model_dir("llama"), **given)
    assert not [*tmp_path.iterdir()]  # nor an empty folder


def test_the_command_needs_a_reward(tiny_model_dir, tmp_path: Path) -> None:
    rows = rows_file(tmp_path / "rows.jsonl", ROWS)
    asked = words("compare", objective="grpo", data=rows, out=tmp_path / "c", max_length=300)
    told = refused(*asked, "--model", str(tiny_model_dir("llama")))
    assert "found no reward" in told


def test_methods_that_can_not_are_left_out_and_named(tiny_model_dir, tmp_path, monkeypatch) -> None:
    told, planned = io.StringIO(), list[str]()

    def plan(task: Any, asked: list[Variant], *_: object) -> list[Measurement]:
        planned.extend(one.method for one in asked)
        return [BEFORE, BETTER]

    monkeypatch.setattr(run, "compare", plan)
    (tmp_path / "c").mkdir()
    console = Console(file=told, width=200)
    given: dict[str, Any] = {"methods": [], "console": console, "rewards": "regex:a"}
    compared(tmp_path / "c", tiny_model_dir("llama"), **given)
    assert not {"fish", "lt-sft", "linear-probe", "fastfood"} & {*planned}
    assert {"lora", "dora", "full", "prefix"} <= {*planned}
    left_out = [line for line in told.getvalue().splitlines() if "chooses the trained" in line]
    assert [line.split()[0] for line in left_out] == ["lt-sft", "fish"]
    scored = lf.Recipe(objective="grpo", objective_options={"rewards": ["0.5*adapter:a"]})
    assert "which the reward adapter uses too" in str(run.unsupported_reason(scored, "full"))
    assert run.unsupported_reason(scored, "lora") is None
    assert run.unsupported_reason(lf.Recipe(), "fish") is None
