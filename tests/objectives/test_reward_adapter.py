"""A reward adapter of the policy's own base as a reward: scores, the shared base, refusals."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import lorafold as lf
from conftest import lorafold, refused
from interrupted_runs import interrupted
from lorafold.engine import Engine
from lorafold.errors import LorafoldError
from lorafold.evaluation.reward_adapter import RewardAdapter
from lorafold.objectives.objective import Packing
from lorafold.resolve import Base
from lorafold.rewards import Judged, RewardName, Rewards
from process_cases import same_bytes

pytestmark = pytest.mark.usefixtures("unestimated")
WORDS = ("red", "blue", "green", "gold")
PAIRS = [
    {"prompt": f"Say {word}", "chosen": f"{word} it is", "rejected": "no, " * n + "not that"}
    for n, word in enumerate(WORDS, 1)
]
TEXTS = ["red it is", "", "no", "<|im_end|> is a text here", "table " * 30, "no, no"]
ROWS = [{"prompt": f"Say {word}"} for word in WORDS]


def short(completion: str) -> float:
    return -len(completion)


def expected(model: Path, *adapters: Path, storage: str = "auto") -> list[float]:
    """The scores that `lf.score` gives the texts that are not empty."""
    rows = [{"prompt": "Say red", "completion": text} for text in TEXTS if text]
    found = lf.score(str(model), rows, adapters=adapters, storage=storage, device="cpu")
    return [row.scores["score"] for row in found.rows]


def recipe(**changes: Any) -> lf.Recipe:
    given = {"steps": 2, "batch": 2, "max_length": 96, "storage": "fp32"}
    return lf.Recipe(**{**given, **changes})


def policy(model: Path, out: Path, *rewards: Any, **changes: Any) -> Any:
    options = {"group": 3, "max_new_tokens": 5}
    asked = recipe(objective="grpo", objective_options=options, **changes.pop("recipe", {}))
    return lf.train(asked, model=model, data=ROWS, out=out, rewards=[*rewards], **changes)


def reward_model(model: Path, out: Path, **changes: Any) -> Path:
    asked = recipe(objective="reward", lr=3e-2, **changes.pop("recipe", {}))
    lf.train(asked, model=model, data=PAIRS, out=out, **changes)
    return out


@pytest.fixture(scope="module")
def reward(tiny_model_dir, tmp_path_factory) -> tuple[Path, Path]:
    model = tiny_model_dir("llama")
    return model, reward_model(model, tmp_path_factory.mktemp("reward") / "adapter")


@contextmanager
def scoring(model: Any, text: str, base: Base, packing: Packing = True) -> Iterator[Any]:
    adapter = RewardAdapter.of(RewardName.parse(text), base)
    with adapter.over(model, packing, Console(quiet=True)) as found:
        yield found


def judged(prompt: Any, texts: list[str], **row: Any) -> list[Judged]:
    return [Judged(prompt, text, row, f"completion {n}") for n, text in enumerate(texts, 1)]


def codes_of(model: Any) -> set[int]:
    """Where bitsandbytes' modules keep tensors that are no parameters."""
    kept = [vars(module) for module in model.modules()]
    states = [of[name] for of in kept for name in ("state", "quant_state") if name in of]
    tensors = [getattr(one, name, None) for one in states for name in ("CB", "SCB", "absmax")]
    return {tensor.data_ptr() for tensor in tensors if tensor is not None}


@pytest.mark.parametrize(
    ("storage", "packing"),
    [
        ("fp32", True), ("nf4", True), ("int8", True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("fp32", False), ("bf16", True)))
    ],
)
def test_scores_are_those_of_score_and_the_base_is_the_policy_s(
    storage: str, packing: bool, tiny_model_dir, tmp_path: Path
) -> None:
    directory = tiny_model_dir("llama-wide")
    out = reward_model(directory, tmp_path / "reward", recipe={"storage": storage})
    base = Base(directory, storage, device="cpu")
    model = base.load()
    model(torch.tensor([[1, 2, 3]]))  # after which int8 has its codes beside the parameters
    before = {p.data_ptr() for p in model.parameters()}
    policy = lf.attach(model, lf.LoRA(rank=2, dropout=0.0), name="policy").requires_grad_()
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=0.5)
    model.train()
    of_score = expected(directory, out, storage=storage)
    with scoring(model, f"adapter:{out}", base, packing) as found:
        scores = found(judged("Say red", TEXTS))
        own = {n: p for n, p in found.shell.named_parameters() if p.data_ptr() not in before}
        assert all(".deltas.reward1." in n or n == "score.weight" for n in own), own.keys()
        assert codes_of(found.shell) == codes_of(model)
        assert bool(codes_of(model)) == (storage in ("nf4", "int8"))
        assert not any(p.requires_grad for p in found.shell.parameters())
        assert not any("policy" in n for n, _ in found.shell.named_parameters())
    assert len({round(score, 6) for score in scores}) == len(TEXTS)
    near = 1e-4 if storage == "fp32" else 2e-2
    found = [s for s, text in zip(scores, TEXTS, strict=True) if text]
    assert found == pytest.approx(of_score, rel=near, abs=near)
    assert all(p.requires_grad for p in policy.parameters())


def test_the_prompt_of_a_group_is_computed_once(reward: tuple[Path, Path]) -> None:
    directory, out = reward
    base = Base(directory, "fp32", device="cpu")
    group = judged("Say red, " * 8, TEXTS)
    calls = list[int]()
    with scoring(base.load(), f"adapter:{out}", base, "auto") as found:
        alone = [found([one])[0] for one in group]
        found.shell.score.register_forward_hook(lambda *of: calls.append(of[2].shape[1]))
        assert found(group) == pytest.approx(alone, rel=1e-4, abs=1e-5)
        found(group[:1])
    together, first = calls
    assert first < together < len(group) * first / 2


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_the_shell_that_an_engine_reads_adapters_for_shares_codes_too(
    storage: str, tiny_model_dir
) -> None:
    base = Base(tiny_model_dir("llama-wide"), storage, device="cpu")
    model = base.load()
    with Engine(model, base.tokenizer(), slots=1, length=16) as engine:
        assert codes_of(engine._reader.shadow) == codes_of(model) != set()


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "gemma"])
def test_every_kind_of_decoder_has_a_shell(kind: str, tiny_model_dir, tmp_path: Path) -> None:
    directory = tiny_model_dir(kind)
    out = reward_model(directory, tmp_path / "reward")
    base = Base(directory, "fp32", device="cpu")
    of_score = expected(directory, out)
    with scoring(base.load(), f"adapter:{out}", base) as found:
        scores = found(judged("Say red", [text for text in TEXTS if text]))
    assert scores == pytest.approx(of_score, rel=1e-4, abs=1e-5)


def test_a_policy_trains_with_it_and_resumes_exactly(reward, tmp_path) -> None:
    directory, _ = reward
    out = shutil.copytree(reward[1], tmp_path / "reward")
    given, changes = [f"0.5*adapter:{out}", short], {"recipe": {"save_every": 1}}
    result = policy(directory, tmp_path / "whole", *given, **changes)
    with interrupted(1):
        policy(directory, tmp_path / "killed", *given, **changes)
    weights = out / "adapter_model.safetensors"
    for name in (out / "manifest.json", out / "lorafold.json"):
        name.unlink()
    save_file({n: t + 1 for n, t in load_file(weights).items()}, weights)
    with pytest.raises(LorafoldError, match=r"settings have changed: rewards\."):
        policy(directory, tmp_path / "killed", *given, resume=True, **changes)
    shutil.rmtree(out)
    shutil.copytree(reward[1], out)
    again = policy(directory, tmp_path / "killed", *given, resume=True, **changes)
    assert again.losses == result.losses
    assert same_bytes(tmp_path / "whole", tmp_path / "killed")


def test_the_sum_has_the_score_with_its_weight_and_a_row_its_own_prompt(reward, tmp_path) -> None:
    directory, out = reward
    base = Base(directory, "fp32", device="cpu")
    asked = {"role": "user", "content": "Say red"}
    said = {"role": "assistant", "content": "blue"}
    with (
        scoring(base.load(), f"0.5*adapter:{out}", base) as found,
        Rewards.of(found, short) as rewards,
    ):
        sums, each = rewards(judged("Say red", TEXTS))
        scores = each[f"adapter:{out}"]
        assert sums == pytest.approx([0.5 * s - len(t) for s, t in zip(scores, TEXTS, strict=True)])
        assert scores == found(judged([asked], TEXTS))  # the same prompt
        other = found(judged([{"role": "system", "content": "Be brief."}, asked], TEXTS))
        assert other == pytest.approx(found(judged("Say red", TEXTS, system="Be brief.")))
        assert min(abs(a - b) for a, b in zip(other, scores, strict=True)) > 1e-5
        # of a row with an answer the prompt alone is taken, for the reward too
        seen = Keeping()
        options = {"group": 2, "max_new_tokens": 3}
        one = recipe(objective="grpo", objective_options=options, steps=1, batch=1)
        rows = [{"messages": [asked, said]}]
        lf.train(one, model=directory, data=rows, out=tmp_path / "drawn", rewards=[seen])
        (drawn, *_) = seen.judged
        assert (drawn.prompt, drawn.row["answer"]) == ([asked], "blue")
        assert found([drawn]) == pytest.approx(found(judged("Say red", [drawn.completion])))


class Keeping:
    """A reward that keeps what it judges."""

    name, weight = "keeping", 1.0

    def __call__(self, judged: list[Judged]) -> list[float]:
        self.judged = judged
        return [float(n) for n, _ in enumerate(judged)]

    def close(self) -> None:
        """Nothing runs."""


@pytest.mark.slow
def test_a_reward_over_a_stack_and_a_policy_over_one(reward, tmp_path) -> None:
    """Each has its own adapters below, whichever those of the other are."""
    directory, plain = reward
    sft = recipe(lr=3e-2, steps=4)
    lf.train(sft, model=directory, data=PAIRS, out=tmp_path / "sft")
    over = reward_model(directory, tmp_path / "over", over=[tmp_path / "sft"])
    base = Base(directory, "fp32", device="cpu")
    model = base.load()
    lf.load(model, tmp_path / "sft", "sft")
    for out, stack in ((over, [tmp_path / "sft", over]), (plain, [plain])):
        of_score = expected(directory, *stack, storage="fp32")
        with scoring(model, f"adapter:{out}", base) as found:
            scores = found(judged("Say red", [text for text in TEXTS if text]))
        assert scores == pytest.approx(of_score, rel=1e-4)
    policy(directory, tmp_path / "policy", f"adapter:{over}", short, over=[tmp_path / "sft"])
    (tmp_path / "sft").rename(tmp_path / "elsewhere")
    with pytest.raises(LorafoldError, match=r"which was not found in .*sft; copy that adapter"):
        policy(directory, tmp_path / "refused", f"adapter:{over}")


WRONG = {
    "plain": "reward adapter:.*: found an adapter of a language model, expected an adapter of",
    "none": "reward: found no adapter_config.json, expected the directory of an adapter",
    "damaged": "reward: adapter_model.safetensors",
    "headless": "reward: missing key .*score.weight",
    "base": "reward: the adapter was trained on another base",
    "full": "trains the base weights themselves, but a reward adapter needs",
    "name": "reward 'adapter:': expected FILE.py:fn, .* or adapter:DIR",
}


@pytest.mark.parametrize("case", WRONG)
def test_what_can_t_score_is_refused_before_anything_runs(case: str, reward, tmp_path) -> None:
    directory, out = reward[0], shutil.copytree(reward[1], tmp_path / "reward")
    changes: dict[str, Any] = {"recipe": {"method": "full"} if case == "full" else {}}
    weights, record = out / "adapter_model.safetensors", out / "lorafold.json"
    if case in ("plain", "none"):
        shutil.rmtree(out)
    if case in ("headless", "base"):
        (out / "manifest.json").unlink()
    if case == "plain":
        lf.train(recipe(steps=1), model=directory, data=PAIRS, out=out)
    elif case == "none":
        out.mkdir()
    elif case == "damaged":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif case == "headless":
        save_file({n: t for n, t in load_file(weights).items() if "score" not in n}, weights)
    elif case == "base":
        kept = json.loads(record.read_text())
        name = next(n for n, of in kept["base"].items() if len(of["shape"]) == 2)
        kept["base"][name]["values"] = "3f800000" * 16
        record.write_text(json.dumps(kept))
    text = "adapter:" if case == "name" else f"adapter:{out}"
    with pytest.raises(LorafoldError, match=WRONG[case]) as error:
        policy(directory, tmp_path / "policy", text, **changes)
    assert "\n" not in str(error.value)
    assert not [*tmp_path.glob("policy*")]


def test_a_run_does_not_write_over_it(reward: tuple[Path, Path], tmp_path: Path) -> None:
    directory, out = reward
    name, before = f"0.5*adapter:{out}", sorted(out.iterdir())
    for target in (out, out / "inside"):
        with pytest.raises(LorafoldError, match=r"write .* overlaps with the input for --reward"):
            policy(directory, target, name, overwrite=True)
    assert sorted(out.iterdir()) == before


def test_it_needs_a_model_and_a_finite_weight(reward: tuple[Path, Path]) -> None:
    with pytest.raises(LorafoldError, match="a reward model needs the base in memory, as in"):
        Rewards.of(f"adapter:{reward[1]}")
    with pytest.raises(LorafoldError, match="found weight inf, expected a finite number"):
        RewardName.parse(f"inf*adapter:{reward[1]}")


def test_the_command_s_option_is_a_spelling_of_the_name(reward, tmp_path) -> None:
    directory, out = reward
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    given = [
        "train", "--objective", "grpo", "--data", data, "--model", directory, "--device", "cpu",
        "--storage", "fp32", "--steps", "1", "--batch", "2", "--objective-options", "group=3",
        "--objective-options", "max_new_tokens=4",
    ]  # fmt: skip
    done = lorafold(*given, "--out", tmp_path / "a", "--reward-adapter", out)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "a" / "lorafold.json").read_text())
    assert record["recipe"]["objective_options"]["rewards"] == [f"adapter:{out}"]
    told = refused(*given, "--out", tmp_path / "c", "--reward-adapter", tmp_path)
    assert "found no adapter_config.json, expected the directory of an adapter" in told
