"""Preferences: the algorithms against TRL's trainers and closed forms, examples, and runs."""

import inspect
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer

import lorafold as lf
from conftest import lorafold, make_tokenizer
from interrupted_runs import interrupted
from lorafold.api.arguments import console_or_quiet
from lorafold.core.attach import selection_of
from lorafold.core.contexts import evaluating
from lorafold.data.examples import encode
from lorafold.data.preference_examples import MismatchedExamples, encode_preferences
from lorafold.errors import LorafoldError
from lorafold.evaluation.preference_metrics import preference_figures
from lorafold.objectives import OBJECTIVES
from lorafold.objectives.algorithm_options import preference_algorithm
from lorafold.objectives.preference import digest, with_reference
from lorafold.runtime.processes import SINGLE_PROCESS
from lorafold.training_step import preference_algorithms
from lorafold.training_step.data_parallel import Replicated
from lorafold.training_step.preference_algorithms import Dpo, Ipo, Kto, Law, Orpo, Scored, Simpo
from lorafold.training_step.preference_loss import Preferences
from lorafold.training_step.shared_prefixes import sharing_prefixes
from own_caches import shared
from preference_cases import JUDGED, PAIRS, adapted, asked, check_gradients, examples_of, trainer_of

pytestmark = pytest.mark.usefixtures("unestimated")

DESIRABLE = [row["label"] for row in JUDGED]
OF_TRL: dict[str, Any] = {
    "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
}  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tiny(tiny_model_dir) -> tuple[Any, Any, Path]:
    path = tiny_model_dir("llama")
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path), path


@pytest.mark.parametrize("way", ["shared", "packed", "padded"])
@pytest.mark.parametrize(
    ("law", "theirs"),
    [
        (Dpo(beta=0.3), {"loss_type": "sigmoid", "beta": 0.3}),
        (
            Dpo(beta=0.3, label_smoothing=0.1, loss_type="robust"),
            {"loss_type": "robust", "beta": 0.3, "label_smoothing": 0.1},
        ),
        (
            Dpo(beta=0.3, loss_type="exo"),
            {"loss_type": "exo_pair", "beta": 0.3, "label_smoothing": 1e-3},
        ),
        (
            Dpo(beta=0.3, label_smoothing=0.2, loss_type="exo"),
            {"loss_type": "exo_pair", "beta": 0.3, "label_smoothing": 0.2},
        ),
        (preference_algorithm("hinge", 0.3, {}), {"loss_type": "hinge", "beta": 0.3}),
        (Ipo(beta=0.4), {"loss_type": "ipo", "beta": 0.4}),
    ],
    ids=["dpo", "robust", "exo", "smoothed exo", "hinge", "ipo"],
)
def test_losses_and_gradients_are_those_of_trl(
    law: Law, theirs: dict[str, Any], way: str, tiny: Any, tmp_path: Path
) -> None:
    model, tokenizer, path = tiny
    adapter = adapted(model)
    adapter.save(tmp_path / "adapter")
    config = DPOConfig(str(tmp_path / "trl"), **OF_TRL, **theirs)
    trainer = trainer_of(DPOTrainer, config, PAIRS, path, tmp_path / "adapter")
    examples = list(examples_of(PAIRS, tokenizer))
    given = []
    for example in examples:
        prompt, (chosen, rejected) = asked(example)
        given.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    batch = trainer.data_collator(given)
    expected = trainer.compute_loss(trainer.model, batch)
    with sharing_prefixes(model) as how:
        assert how.shares
        how.shares = way == "shared"
        loss = Preferences(model, law, None if way == "padded" else how, tokenizer.pad_token_id)
        own = loss(**loss.collate(examples, loss.device)) / len(examples)
        check_gradients(trainer, expected, adapter, own)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("way", ["shared", "padded"])
def test_kto_is_that_of_trl_however_a_step_is_divided(
    way: str, accumulate: int, tiny: Any, tmp_path: Path
) -> None:
    """TRL has the whole step in one batch, over which it takes the mean z."""
    model, tokenizer, path = tiny
    adapter = adapted(model, 10)
    adapter.save(tmp_path / "adapter")
    config = KTOConfig(
        str(tmp_path / "trl"), **OF_TRL, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5,
        per_device_train_batch_size=4, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = trainer_of(KTOTrainer, config, JUDGED, path, tmp_path / "adapter")
    examples = list(examples_of(JUDGED, tokenizer, "judged"))
    given = []
    for example in examples:
        prompt, (own_ids, other_ids) = asked(example)
        ids = {"prompt_ids": prompt, "completion_ids": own_ids, "KL_completion_ids": other_ids}
        given.append({**ids, "label": example.desirable})
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(given))
    law = Kto(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    with sharing_prefixes(model) as how:
        loss = Preferences(model, law, how if way == "shared" else None, tokenizer.pad_token_id)
        parts, of_step = loss.micro_batches(examples, accumulate, 512), loss.of_step(examples)
        assert len(parts) == accumulate
        total, n = of_step["mismatched"].tolist()
        assert total > 0  # z counts
        assert n == len(examples)
        rows = ([examples[i] for i in part] for part in parts)
        own = sum(loss(**loss.collate(some, loss.device), **of_step) for some in rows)
        check_gradients(trainer, expected, adapter, own / len(examples))


def drawn(seed: int = 0) -> Scored:
    """Log-probabilities of six rows, with gradients."""
    torch.manual_seed(seed)
    logps = (-20 * torch.rand(6, 2, dtype=torch.float64) - 1).requires_grad_()
    tokens = torch.randint(2, 9, (6, 2))
    return Scored(logps, logps.detach() + torch.randn(6, 2).double(), tokens, torch.rand(6) > 0.5)


def test_orpo_and_simpo_are_those_of_trl() -> None:
    scored = drawn()
    cpu = SimpleNamespace(device="cpu")
    this = SimpleNamespace(beta=0.7, accelerator=cpu)
    log_ratio, *_ = ORPOTrainer.odds_ratio_loss(this, *scored.means.unbind(1))
    expected = scored.nll - log_ratio
    assert torch.allclose(Orpo(beta=0.7).loss(scored), expected, rtol=1e-5)
    settings: dict[str, Any] = {"alpha": 0.0, "accelerator": cpu, "label_smoothing": 0.0}
    this = SimpleNamespace(**settings, beta=2.5, loss_type="simpo", simpo_gamma=0.8)
    expected, *_ = CPOTrainer.cpo_loss(this, *scored.means.unbind(1))
    assert torch.allclose(Simpo(beta=2.5, gamma=0.8).loss(scored), expected, rtol=1e-6)
    # the smoothed sigmoid of log-probabilities alone is cDPO with a reference of zero
    settings |= {"label_smoothing": 0.1}
    this = SimpleNamespace(**settings, beta=0.2, loss_type="sigmoid")
    expected, *_ = CPOTrainer.cpo_loss(this, *scored.logps.unbind(1))
    plain = scored._replace(reference=torch.zeros_like(scored.logps))
    assert torch.allclose(Dpo(beta=0.2, label_smoothing=0.1).loss(plain), expected, rtol=1e-6)


def test_a_supervised_term_adds_the_loss_of_the_chosen() -> None:
    scored = drawn()
    for law, with_term in [(Dpo(), Dpo(sft_weight=2.0)), (Simpo(), Simpo(sft_weight=2.0))]:
        more = with_term.loss(scored) - law.loss(scored)
        assert torch.allclose(more, -2 * scored.logps[:, 0] / scored.tokens[:, 0])


def test_a_document_is_what_supervised_training_makes_of_it(tiny: Any) -> None:
    _, tokenizer, _ = tiny
    for name, n in (("chosen", 0), ("rejected", 1)):
        rows = [{"prompt": row["prompt"], "completion": row[name]} for row in PAIRS]
        supervised = encode(rows, tokenizer, 512).examples
        documents = [example.documents()[n] for example in examples_of(PAIRS, tokenizer)]
        assert documents == list(supervised)
    for example in examples_of(PAIRS, tokenizer):
        assert len(example.shared) > 0
        assert all(set(branch.labels[1:]) != {-100} for branch in example.branches)


def test_every_shape_of_preferences_gives_the_same_examples(tiny: Any) -> None:
    _, tokenizer, _ = tiny
    expected = list(examples_of(PAIRS, tokenizer))

    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    messages = [
        {name: [{"role": role, "content": row[name]}] for name, role in roles.items()}
        for row in PAIRS
    ]
    implicit = [
        {name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in messages
    ]
    turns = [
        {
            "conversations": [{"from": "human", "value": row["prompt"]}],
            "chosen": {"from": "gpt", "value": row["chosen"]},
            "rejected": {"from": "gpt", "value": row["rejected"]},
        }
        for row in PAIRS
    ]
    for rows in (messages, implicit, turns):
        assert list(examples_of(rows, tokenizer)) == expected


def test_judged_rows_have_the_completion_before_as_a_second_branch(tiny: Any) -> None:
    _, tokenizer, _ = tiny
    examples = examples_of(JUDGED, tokenizer, "judged")
    assert isinstance(examples, MismatchedExamples)
    assert [example.desirable for example in examples] == DESIRABLE
    own = [asked(example)[1] for example in examples]
    assert [second for _, second in own] == [first for first, _ in own[-1:] + own[:-1]]
    assert examples.lengths.tolist() == [len(example.ids) for example in examples]
    # pairs are judged too: twice as many examples
    both = examples_of(PAIRS, tokenizer, "judged")
    assert [example.desirable for example in both] == [True, False] * len(PAIRS)


def test_references_are_the_stack_below_and_are_kept(tiny: Any, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LORAFOLD_CACHE", str(shared(tmp_path / "cache")))
    model, tokenizer, _ = tiny
    examples = examples_of(PAIRS, tokenizer)
    adapted(model)
    with sharing_prefixes(model) as how, evaluating(model):
        sft = Preferences(model, Dpo(), how, 0).scored(list(examples)).logps
    lf.attach(model, lf.LoRA(rank=2), name="dpo")
    with sharing_prefixes(model) as how:
        loss = Preferences(model, Dpo(), how, 0)
        given: tuple[Any, ...] = (examples, [], console_or_quiet(None), Replicated(SINGLE_PROCESS))
        found = with_reference(loss, *given)
        assert torch.allclose(torch.tensor(found.logps), sft, rtol=1e-5)
        monkeypatch.setattr(Preferences, "references", None)
        again = with_reference(loss, *given)
        assert (again.logps == found.logps).all()
        # the adapter that trains is no part of the key, what is below it is
        before = digest(model)
        for p in (p for n, p in model.named_parameters() if ".dpo." in n):
            p.data.add_(1)
        assert digest(model) == before
        next(p for n, p in model.named_parameters() if ".default." in n).data.add_(1)
        assert digest(model) != before
    assert selection_of(model).names == ("default", "dpo")


def test_figures_are_those_of_their_definitions(tiny: Any) -> None:
    model, tokenizer, _ = tiny
    examples = list(examples_of(PAIRS, tokenizer))
    adapted(model)

    def log_softmax(document: Any) -> Tensor:
        ids = torch.tensor([document.ids])
        with evaluating(model):
            return torch.log_softmax(model(ids).logits[0].double(), -1)

    def sums(names: tuple[str, ...]) -> tuple[Tensor, list[Tensor]]:
        rows, whole = [], []
        with lf.only(model, *names):
            for example in examples:
                of = []
                for document in example.documents():
                    table = log_softmax(document)[:-1]
                    at = torch.tensor([n != -100 for n in document.labels[1:]])
                    targets = torch.tensor(document.ids[1:])
                    of.append(table.gather(1, targets[:, None])[at].sum())
                    whole.append(table[at])
                rows.append(torch.stack(of))
        return torch.stack(rows), whole

    (policy, p), (reference, q) = sums(("default",)), sums(())
    with sharing_prefixes(model) as how:
        found = preference_figures(Preferences(model, Dpo(beta=0.3), how, 0), examples, True)
    margins = 0.3 * ((policy - reference)[:, 0] - (policy - reference)[:, 1])
    kl = sum((a.exp() * (a - b)).sum() for a, b in zip(p, q, strict=True)) / sum(map(len, p))
    assert found.preference_accuracy == float((policy[:, 0] > policy[:, 1]).double().mean())
    assert found.reward_accuracy == float((margins > 0).double().mean())
    assert found.reward_margin == pytest.approx(float(margins.mean()), rel=1e-4)
    assert found.chosen_change == pytest.approx(float((policy - reference)[:, 0].mean()), rel=1e-4)
    assert found.kl == pytest.approx(float(kl), rel=1e-4)
    assert found.preference_loss == pytest.approx(
        float(-torch.nn.functional.logsigmoid(margins).mean()), rel=1e-4
    )


def test_options_of_objectives_are_checked() -> None:
    assert preference_algorithm("simpo", 2.5, {"gamma": 0.5}) == Simpo(beta=2.5, gamma=0.5)
    for objective, options, told in [
        ("dpo", {"gamma": 1.0}, "the objective dpo has no such option; it has: beta, label_smooth"),
        ("dpo", {"label_smoothing": 0.5}, "label_smoothing: found 0.5, expected less than 0.5"),
        ("kto", {"desirable_weight": 0}, "desirable_weight: found 0, expected greater than 0"),
        ("ipo", {"per_token": "often"}, "per_token: found 'often', expected a valid boolean"),
    ]:
        with pytest.raises(LorafoldError, match=told):
            preference_algorithm(objective, None, options)
    none = lf.Recipe(objective="dpo", beta=0)  # which a policy takes: its default
    with pytest.raises(LorafoldError, match=r"objective dpo: beta: found 0.0, expected greater"):
        preference_algorithm(none.objective, none.beta, {})
    compared = [name for name, one in OBJECTIVES.items() if one.law and not one.draws]
    laws = {law for law in vars(preference_algorithms).values() if inspect.isclass(law)}
    laws = {law for law in laws if issubclass(law, Law) and law is not Law}
    assert {type(preference_algorithm(name, None, {})) for name in compared} == laws


@pytest.mark.parametrize(
    ("objective", "rows", "told"),
    [
        ("dpo", [*PAIRS, PAIRS[0] | {"rejected": PAIRS[0]["chosen"]}],
         "row 5: fields chosen and rejected: found the same text, expected different texts"),
        ("kto", [*JUDGED, JUDGED[0] | {"label": "good"}, {"prompt": "a", "completion": "b"}],
         "row 5: field label: found text, expected true or false; row 6: field label: found"
         " null"),
        ("dpo", JUDGED, "data: found rows of {prompt, completion}, which are for --objective sft or"
         " kto; --objective dpo expects rows of {prompt, chosen, rejected}"),
        ("dpo", [{"chosen": [{"role": "user", "content": "a"}],
                  "rejected": [{"role": "user", "content": "b"}]}],
         "row 1: fields chosen and rejected: found different first messages, expected the same"),
    ],
    ids=["equal", "label", "shape", "prompt"],
)  # fmt: skip
def test_bad_rows_are_named(
    objective: str, rows: list[dict[str, Any]], told: str, tiny_model_dir, tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", rows)
    found = lorafold(
        "train", "--objective", objective, "--model", str(tiny_model_dir("llama")),
        "--data", str(data), "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert found.returncode == 2
    assert told in " ".join(found.stderr.split())
    assert not (tmp_path / "out").exists()


def test_rows_that_are_equal_after_cutting_are_named(tiny: Any) -> None:
    _, tokenizer, _ = tiny
    rows = [*PAIRS, {"prompt": "Hi", "chosen": "the fox and the dog", "rejected": "the fox and"}]
    whole = len(examples_of(rows[-1:], tokenizer)[0].documents()[1].ids)
    with pytest.raises(LorafoldError, match="row 2: chosen and rejected become equal; raise max"):
        encode_preferences(rows[3:], tokenizer, whole - 3, "pairs")
    with pytest.raises(LorafoldError, match="row 1: no trained token of a completion remains"):
        encode_preferences(PAIRS[2:3], tokenizer, 6, "pairs")


RECIPES = {
    "dpo": {"objective_options": {"sft_weight": 0.5}},
    "ipo": {}, "hinge": {}, "orpo": {}, "simpo": {}, "kto": {"storage": "nf4"},
}  # fmt: skip


@pytest.mark.estimated
@pytest.mark.few(3)
@pytest.mark.parametrize("objective", RECIPES)
def test_every_objective_trains_and_is_measured(objective: str, tiny_model_dir, tmp_path) -> None:
    base, out = tiny_model_dir("llama-wide"), tmp_path / "out"
    rows = JUDGED if objective == "kto" else PAIRS
    recipe = lf.Recipe(
        objective=objective, steps=11, batch=4, lr=3e-3, lr_b=3e-2, rank=4, dropout=0.0,
        **({"storage": "fp32"} | RECIPES[objective]),
    )  # fmt: skip
    found = lf.train(recipe, model=base, data=rows, eval_data=rows, out=out)
    assert found.losses[-1] < found.losses[0]
    assert found.guessing["better"]
    assert found.guessing["guessing"] == found.losses[0]
    assert found.figures["reward_margin"] > 0
    if objective != "kto":
        result = lf.evaluate(base, rows, adapters=out, storage=recipe.storage)
        told = result.as_json()
        assert told["reward_accuracy"] == 1.0
        assert told["reward_margin"] == pytest.approx(found.figures["reward_margin"], rel=1e-3)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("method", "lr"),
    [
        ("lora", 1e-2), ("ia3", 1e-1), ("full", 3e-3), ("prompt", 0.3), ("adalora", 1e-1),
        ("prefix", 0.3), ("fish", 1e-2),
        pytest.param("dora", 1e-2, marks=pytest.mark.slow),
        pytest.param("loha", 1e-1, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_methods_learn_preferences(method: str, lr: float, tiny_model_dir, tmp_path) -> None:
    recipe = lf.Recipe(
        objective="dpo", method=method, steps=30, batch=4, lr=lr, lr_b=lr, storage="fp32"
    )
    base, out = tiny_model_dir("llama"), tmp_path / "out"
    found = lf.train(recipe, model=base, data=PAIRS, eval_data=PAIRS, out=out)
    assert found.losses[0] == pytest.approx(math.log(2), rel=2e-2)
    assert found.losses[-1] < math.log(2)
    assert found.figures["reward_accuracy"] >= 0.75


@pytest.mark.parametrize(
    "epochs",
    [
        pytest.param(2.0, id="kept references"),
        pytest.param(0.5, id="references in each step", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_crashed_over_a_stack_ends_like_one_that_did_not(
    epochs: float, tiny_model_dir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model_dir("llama")
    common = {"rank": 4, "storage": "bf16", "lr": 1e-3, "lr_b": 1e-2}
    supervised = lf.Recipe(steps=2, batch=4, **common)
    lf.train(supervised, model=model, data=PAIRS, out=tmp_path / "sft")
    files = {path.name: path.read_bytes() for path in (tmp_path / "sft").iterdir()}
    how = {"epochs": epochs, "batch": 2, "save_every": 2, "dropout": 0.1, **common}
    given: dict[str, Any] = {"model": model, "data": PAIRS * 4, "over": tmp_path / "sft"}

    def run(out: str, resume: bool = False) -> bytes:
        cache = shared(tmp_path / f"cache of {out} {resume}")
        monkeypatch.setenv("LORAFOLD_CACHE", str(cache))
        recipe = lf.Recipe(objective="dpo", **how)
        lf.train(recipe, **given, out=tmp_path / out, resume=resume)
        return (tmp_path / out / "adapter_model.safetensors").read_bytes()

    straight = run("straight")
    with interrupted(3, RuntimeError):
        run("stopped")
    assert run("stopped", resume=True) == straight
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "sft").iterdir()}


@pytest.mark.few(1)
@pytest.mark.parametrize(("objective", "rows"), [("dpo", PAIRS), ("kto", JUDGED)])
def test_every_way_through_a_step_gives_the_same_losses(
    objective: str, rows: list[dict[str, Any]], tiny_model_dir, tmp_path: Path
) -> None:
    ways: dict[str, dict[str, Any]] = {
        "padded": {"packing": False},
        "accumulated": {"accumulate": 2},
        "split": {"max_length": 60},
        "checkpointed": {"gradient_checkpointing": True},
    }

    def losses(name: str, **fields: Any) -> tuple[float, ...]:
        recipe = lf.Recipe(**{
            "objective": objective, "epochs": 2, "batch": 4, "lr": 1e-2, "lr_b": 1e-2,
            "storage": "fp32", "packing": True, **fields,
        })  # fmt: skip
        model = tiny_model_dir("llama")
        return lf.train(recipe, model=model, data=rows * 2, out=tmp_path / name).losses

    expected = losses("shared", dropout=0.3)
    for name, fields in ways.items():
        assert losses(name, dropout=0.3, **fields) == pytest.approx(expected, rel=1e-4), name
    # prompts of several rows that begin alike have one draw of dropout, and without it one loss
    across, alone = (losses(f"{way}", packing=way, dropout=0.0) for way in ("auto", True))
    assert across == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_recurrent_models_are_padded_and_told(tmp_path: Path) -> None:
    from transformers import MambaConfig

    tokenizer = make_tokenizer()
    config = MambaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=4,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    console = Console(record=True, width=200, quiet=False, file=io.StringIO())
    found = lf.train(
        lf.Recipe(objective="dpo", steps=3, batch=4, lr=1e-2, storage="fp32", dropout=0.0),
        model=tmp_path / "mamba", data=PAIRS, out=tmp_path / "out", console=console, verbose=True,
    )  # fmt: skip
    assert found.losses[0] == pytest.approx(math.log(2), rel=1e-4)
    assert "this model can't share a prompt among completions" in console.export_text()


def test_a_preview_shows_both_completions(tiny_model_dir, tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    found = lorafold(
        "train", "--objective", "dpo", "--model", str(tiny_model_dir("llama")), "--data",
        str(data), "--out", str(tmp_path / "out"), "--preview",
    )  # fmt: skip
    text = found.stdout + found.stderr
    assert text.count("chosen:") == text.count("rejected:") == 3
    assert "⟦The table is booked.<|im_end|>⟧" in text
    assert "⟦No.<|im_end|>⟧" in text


def test_judged_rows_of_one_kind_have_no_margin(tiny: Any) -> None:
    model, tokenizer, _ = tiny
    adapted(model)
    good = [row for row in JUDGED if row["label"]]
    with sharing_prefixes(model) as how:
        loss = Preferences(model, Kto(), how, 0)
        found = preference_figures(loss, list(examples_of(good, tokenizer, "judged")), True)
    assert found.reward_margin is None
    assert found.rejected_change is None
    assert found.chosen_change is not None
    json.dumps(found.as_json(), allow_nan=False)
    assert "reward margin" not in str(found)


def test_the_held_out_loss_of_kto_does_not_depend_on_batches(tiny: Any) -> None:
    model, tokenizer, _ = tiny
    adapted(model)
    examples = list(examples_of(JUDGED, tokenizer, "judged"))
    with sharing_prefixes(model) as how:
        losses = []
        for tokens in (1, 2048):
            loss = Preferences(model, Kto(beta=0.5), how, 0, tokens)
            losses.append(preference_figures(loss, examples, True).preference_loss)
        loss = Preferences(model, Kto(beta=0.5), how, 0)
        with evaluating(model):
            whole = loss(**loss.collate(examples, loss.device), **loss.of_step(examples))
    assert losses == pytest.approx([float(whole) / len(examples)] * 2, rel=1e-5)
