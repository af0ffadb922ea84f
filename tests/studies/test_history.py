"""The history of a run: kept with its adapter, the same after a kill, and a page."""

import json
from pathlib import Path
from typing import Any

import pytest

import lorafold as lf
from command_cases import printed
from interrupted_runs import interrupted
from lorafold.errors import LorafoldError
from lorafold.evaluation.observations import observations_of
from lorafold.inspecting.history import History
from lorafold.inspecting.history_page import page
from lorafold.training.checkpoint import Progress

pytestmark = pytest.mark.usefixtures("unestimated")
ROWS = [{"prompt": f"Say {word}", "word": word} for word in ("red", "blue", "green", "gold")]
HOSTILE = '<script>alert("it")</script>$x$ --> <b>'


def letters(completion: str, word: str) -> float:
    return sum(letter in completion for letter in word) / len(word)


def short(completion: str) -> float:
    return -len(completion)


def trained(model: Path, out: Path, *, steps: int = 4, **changes: Any) -> Any:
    recipe = lf.Recipe(
        objective="grpo", steps=steps, batch=2, max_length=96, storage="fp32", save_every=1,
        eval_every=2, lr=1e-2, objective_options={"group": 4, "max_new_tokens": 6},
    )  # fmt: skip
    held_out = [{"prompt": f"Say {HOSTILE}", "word": "red"}, *ROWS[:2]]
    given: dict[str, Any] = {"rewards": [letters, short], "eval_data": held_out, **changes}
    return lf.train(recipe, model=model, data=ROWS, out=out, **given)


def record(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "lorafold.json").read_text())
    return found


@pytest.fixture(scope="module")
def whole(tiny_model_dir, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, trained(tiny_model_dir("llama"), out)


def test_each_step_and_each_measure_is_kept(whole: tuple[Path, Any]) -> None:
    out, result = whole
    found = record(out)
    assert {len(values) for values in found["steps"].values()} == {4}
    assert {"reward", "reward letters", "reward short", "entropy", "mismatch"} <= {*found["steps"]}
    assert found["held_out"]["step"] == [0, 2, 4] == [int(step) for step in found["evals"]]
    for n, loss in enumerate(found["evals"].values()):
        assert found["held_out"]["reward"][n] == pytest.approx(-loss, rel=1e-5)
        low, high = found["held_out"]["reward_interval"][n]
        assert low <= found["held_out"]["reward"][n] <= high
    assert found["judged_by"] == {"letters": 1.0, "short": 1.0}
    assert [found["samples"][side]["step"] for side in ("first", "last")] == [0, 4]
    for side in found["samples"].values():
        rewards = [one["reward"] for one in side["samples"]]
        assert rewards == sorted(rewards, reverse=True)
        assert all(sum(one["each"].values()) == one["reward"] for one in side["samples"])
    pace = result.pace
    parts = sum(pace[f"{name} seconds"] for name in ("drawing", "judging", "learning"))
    assert parts == pytest.approx(result.seconds)
    assert pace["drawn tokens/s"] == pytest.approx(pace["drawn tokens"] / pace["drawing seconds"])
    assert 4 * 8 <= pace["drawn tokens"] <= 4 * 8 * 6


def test_what_was_measured_before_the_first_step_is_no_best_step() -> None:
    assert Progress(evals={0: -1.0, 5: -0.5, 9: -0.7}).best == 9
    assert Progress(evals={0: -1.0}).best is None


def test_a_run_that_was_killed_has_the_same_record(whole, tiny_model_dir, tmp_path) -> None:
    with interrupted(3):
        trained(tiny_model_dir("llama"), tmp_path / "a")
    state = tmp_path / "a.run" / "step-000003" / "state.json"
    assert {"shown", "measured", "samples"} <= {*json.loads(state.read_text())}
    trained(tiny_model_dir("llama"), tmp_path / "a", resume=True)
    assert record(tmp_path / "a") == record(whole[0])


def test_a_step_without_a_figure_has_none() -> None:
    progress = Progress()
    shown: list[dict[str, float]] = [{"a": 1.0}, {}, {"a": 2.0, "b": float("inf")}, {"b": 3.0}]
    for figures in shown:
        progress.step += 1
        progress.add_figures(figures)
    assert progress.shown == {"a": [1.0, None, 2.0, None], "b": [None, None, None, 3.0]}
    assert progress.pace == {}


def test_samples_of_steps_where_nothing_is_held_out(tiny_model_dir, tmp_path: Path) -> None:
    trained(tiny_model_dir("llama"), tmp_path / "a", steps=2, rewards=short, eval_data=None)
    found = record(tmp_path / "a")
    assert [found["samples"][side]["step"] for side in ("first", "last")] == [1, 2]
    assert found["samples"]["last"]["samples"][0]["each"] == {}
    assert not found["evals"]
    assert "held_out" not in found
    assert "held-out" not in str(lf.history(tmp_path / "a"))


def test_the_card_says_what_judged_and_what_it_came_to(whole: tuple[Path, Any]) -> None:
    out = whole[0]
    text = (out / "README.md").read_text()
    first, *_, last = record(out)["held_out"]["reward"]
    assert "| judged by | 1 x letters, 1 x short |" in text
    assert f"| held-out reward before the first step | {first:.4g} (95%: " in text
    assert f"| held-out reward after step 4 | {last:.4g} (95%: " in text
    assert "drawn tokens/s" in text
    assert "| objective | grpo |" in text


def test_the_page_has_all_and_shows_completions_as_text(whole, tmp_path) -> None:
    out, file = whole[0], tmp_path / "page.html"
    found = printed("history", out, html=file)
    assert found["held_out"]["step"] == [0, 2, 4]
    text = file.read_text()
    assert text.count("<svg") == len(plots(found))
    assert "The same in every step: " in text
    assert "Say &lt;script&gt;alert(&#34;it&#34;)&lt;/script&gt;$x$ --&gt;" in text
    assert "Before the first step" in text
    assert "src=" not in text


def test_the_page_begins_with_the_configuration_of_the_run(whole, tmp_path, tiny_model_dir) -> None:
    found = lf.history(whole[0])
    settings = found.configuration
    assert settings["base model"] == f"{tiny_model_dir('llama')}, fp32"
    assert settings["method"].startswith("lora, r = 16")
    assert settings["learning rate"] == "0.01 (peak), cosine"
    assert (settings["steps"], settings["batch size"], settings["seed"]) == ("4", "2", "0")
    assert settings["training data"] == "rows given in Python, 4 rows"
    file = tmp_path / "page.html"
    lf.history(whole[0], html=file)
    text = file.read_text()
    assert all(name in text and value in text for name, value in settings.items())


def plots(found: dict[str, Any]) -> set[str]:
    still = {name for name, values in found["steps"].items() if len({*values}) == 1}
    assert "clipped" in still
    names = {*found["steps"], "loss"} - still - {"largest mismatch"}
    return {"each reward" if name.startswith("reward ") else name for name in names}


def shown(tmp_path: Path, each: dict[str, list[float]]) -> str:
    """The page of a run with these rewards, each with weight 1."""
    steps = {f"reward {name}": values for name, values in each.items()}
    total = [sum(values) for values in zip(*each.values(), strict=True)]
    found = History(
        "a", {"objective": "grpo"}, [1.0] * len(total), {"reward": total} | steps, {}, {},
        dict.fromkeys(each, 1.0), {}, [],
    )  # fmt: skip
    page(found, tmp_path / "page.html")
    return (tmp_path / "page.html").read_text()


def test_a_reward_that_alone_changes_has_the_curve_of_the_sum(tmp_path: Path) -> None:
    rises = [n / 8 for n in range(6)]
    text = shown(tmp_path, {"up": rises, "flat": [0.5] * 6})
    assert "each reward" not in text
    assert text.count("<svg") == 2  # the sum and the loss
    assert "From 0.5 to 1.125. Of the rewards, only up changes, from 0 to 0.625." in text
    assert "The same in every step: reward flat 0.5." in text
    assert shown(tmp_path, {"up": rises, "down": UP[:6]}).count("<svg") == 3


def test_many_rewards_are_in_plots_of_a_few_and_told_apart(tmp_path: Path) -> None:
    parts = ("length", "words", "form", "order", "style", "tone")
    long = "/home/me/rewards/of_answers.py:{}_of_the_answer"
    each = {long.format(part): [n * k / 8 for n in range(6)] for k, part in enumerate(parts, 1)}
    text = shown(tmp_path, each)
    assert "each reward: 1 to 3 of 6" in text
    assert "each reward: 4 to 6 of 6" in text
    for part in parts:
        assert f">…{part}…</text>" in text
        assert f"…{part}… from 0 to" in text


def test_names_and_completions_run_nothing(tmp_path: Path) -> None:
    one = {"where": HOSTILE, "prompt": HOSTILE, "completion": f"\ud800\0{HOSTILE}", "reward": 1.0}
    side = {"step": 1, "samples": [one | {"ended": False, "each": {HOSTILE: 1.0}}]}
    names = {f"reward {HOSTILE}": UP[:6], r"reward $\nope$": UP[:6], r"$\nope$": UP[:6]}
    found = History(
        HOSTILE, {"objective": HOSTILE, "method": HOSTILE}, [1.0] * 6, names, {3: 1.0},
        {"step": [3], "reward": [1.0], "reward_interval": [None]}, {HOSTILE: 1.0},
        {"first": side, "last": side | {"samples": []}}, [HOSTILE],
    )  # fmt: skip
    page(found, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text
    assert "\0" not in text


def test_a_run_of_an_earlier_version_and_one_without_rewards(tmp_path: Path) -> None:
    recipe = {"objective": "sft", "method": "lora"}
    old = {"recipe": recipe, "losses": [3.0, 2.0], "evals": {"2": 1}}
    (tmp_path / "lorafold.json").write_text(json.dumps(old))
    found = lf.history(tmp_path)
    assert found.in_words("loss") == "1 after step 2"
    assert found.observations == []
    page(found, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("<svg") == 1
    with pytest.raises(LorafoldError, match=r"found no lorafold\.json, expected the out"):
        lf.history(tmp_path / "none")


INTERVAL = {"step": [0, 1], "reward": [1, 2], "reward_interval": [[1, 2], 3]}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"steps": {"reward": [1.0]}}, r"lorafold train: steps\.reward: 1, not 2 values"),
        ({"losses": [1e200, 0]}, r"losses\.0: found 1e\+200, expected a value from -1e\+150 to"),
        ({"losses": [float("nan"), 0]}, r"losses\.0: Input should be a finite number"),
        ({"held_out": {"step": [0, None], "reward": [1, 2]}}, r"held_out\.step: expected int"),
        ({"held_out": {"step": [0, 1], "reward": [[1, 2], 3]}}, r"held_out\.reward: expected num"),
        ({"held_out": INTERVAL}, r"held_out\.reward_interval: expected pairs"),
        ({"held_out": {"reward": [1, 2]}}, r"held_out\.reward: 2, not 0 values"),
        ({"recipe": {"objective_options": "x"}}, r"recipe\.objective_options: expected an object"),
        ({"steps": {"reward": ["x"]}}, r"steps\.reward\.0.*valid number"),
        ({"held_out": {"step": [1], "reward": [0.5], "reward_interval": ["x"]}},
         r"held_out\.reward_interval\.0"),
        ({"recipe": None}, "record of lorafold train: recipe: Field"),
    ],
)  # fmt: skip
def test_a_record_that_was_changed_by_hand(changed: dict[str, Any], told: str, tmp_path) -> None:
    kept = {"recipe": {}, "losses": [1.0, 0.5]} | changed
    kept = {name: value for name, value in kept.items() if value is not None}
    (tmp_path / "lorafold.json").write_text(json.dumps(kept))
    with pytest.raises(LorafoldError, match=told):
        lf.history(tmp_path)


def test_a_record_of_depth_and_one_with_controls(tmp_path: Path) -> None:
    (tmp_path / "lorafold.json").write_text("[" * 100_000)
    with pytest.raises(LorafoldError, match="not readable as JSON"):
        lf.history(tmp_path)
    kept = {"recipe": {}, "losses": [1.0], "judged_by": {"\x1b[2J\nerror": 1}}
    (tmp_path / "lorafold.json").write_text(json.dumps(kept))
    assert str(lf.history(tmp_path)).splitlines()[1] == r"judged by 1 x \x1b[2J\nerror"


UP, DOWN = [n / 10 for n in range(30)], [3 - n / 10 for n in range(30)]
OBSERVED = [
    ({"entropy": [2.0] * 27 + [0.1] * 3}, "Entropy fell from 2 to 0.1 nats per token, 5% of"),
    ({"cut off": [0.0] * 27 + [0.75] * 3}, "75% of the completions of the last 3 steps were cut"),
    ({"groups without signal": [0.9] * 30}, "90% of the groups of the last 3 steps had the same"),
    ({"reward": UP, "reward a": DOWN}, "rose from 0.1 to 2.8, reward a fell from 2.9 to 0.2."),
    ({"reward": UP, "tokens a completion": [10.0 + n for n in range(30)]}, "grew from 11 to 38"),
    ({"reward": UP, "tokens a completion": [40.0 - n for n in range(30)]}, "shrank from 39 to 12"),
]


@pytest.mark.parametrize(("steps", "said"), OBSERVED)
def test_what_is_observed(steps: dict[str, list[float]], said: str) -> None:
    (found,) = observations_of(steps, {}, {"max_new_tokens": 16})
    assert said in found
    calm = {name: [1.0, 0.9, 1.1, None] * 8 for name in steps if name.startswith("reward")}
    steady = {name: [0.5] * 32 for name in steps} | calm
    assert observations_of(steady, {}, {}) == []


def test_what_is_observed_on_held_out_prompts() -> None:
    found = {"step": [0, 5, 9], "reward": [0.5, 0.6, 0.2]}
    apart = found | {"reward_interval": [[0.4, 0.6], None, [0.1, 0.3]]}
    fell, best = observations_of({}, apart, {})
    assert fell == "The held-out reward fell from 0.5 before the first step to 0.2 after step 9."
    assert "highest after step 5 (0.6) and 0.2 after step 9" in best
    own = observations_of({}, found | {"reward_interval": [None] * 3}, {}, saved_at=5)
    assert "step 5 is this one" in own[0]
    touching = found | {"reward_interval": [[0.1, 0.9], None, [0.1, 0.3]]}
    assert len(observations_of({}, touching, {})) == 1
    untrained = {"step": [0, 0], "reward": [0.5, 0.6], "reward_interval": [None] * 2}
    assert observations_of({}, untrained, {}) == []
