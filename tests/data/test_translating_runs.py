"""A translated run labels the tokens and takes the learning rates of the tool's own run."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler
from trl import SFTConfig, SFTTrainer

from lorafold.data.examples import encode
from lorafold.errors import LorafoldError
from lorafold.models.tokenizer import set_template
from lorafold.training_step.optim import set_learning_rates
from translation_cases import axolotl_of, llamafactory_of, remark, translated, trl_of

TURNS = {
    "prompt": [{"role": "user", "content": "Book a table"}],
    "completion": [{"role": "assistant", "content": "for four"}],
}
STRINGS = {"prompt": "Book a table", "completion": " for four"}
IGNORED = -100  # what TRL has in place of a label


def labelled_by_trl(row, path, tmp_path):
    """The ids of a row and those that TRL's trainer labels."""
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(path),
        args=SFTConfig(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([row]),
        processing_class=AutoTokenizer.from_pretrained(path),
    )  # fmt: skip
    [batch] = trainer.get_train_dataloader()
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    return ids, [token for token in labels if token != IGNORED]


def labelled_here(row, tokenizer):
    """The ids of a row and those that lorafold labels."""
    [example] = encode([row], tokenizer, 64).examples
    ids = list(example.ids)
    return ids, [i for i, label in zip(ids, example.labels, strict=True) if label >= 0]


def test_trl_labels_the_line_end_after_a_turn_besides(tmp_path, tiny_model_dir):
    path = tiny_model_dir("llama")
    tokenizer = AutoTokenizer.from_pretrained(path)
    (ids, labels), (own_ids, own) = (
        labelled_by_trl(TURNS, path, tmp_path),
        labelled_here(TURNS, tokenizer),
    )
    assert ids[: len(own_ids)] == own_ids
    assert labels == own + tokenizer.encode("\n", add_special_tokens=False)
    assert "a newline" in str(trl_of(tmp_path, "trl-sft"))


def test_trl_joins_prompt_and_completion_as_template_none_does(tmp_path, tiny_model_dir):
    path = tiny_model_dir("llama")
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = labelled_by_trl(STRINGS, path, tmp_path)
    assert found != labelled_here(STRINGS, tokenizer)
    set_template(tokenizer, "none")
    assert found == labelled_here(STRINGS, tokenizer)
    assert "--chat-template none" in str(trl_of(tmp_path, "trl-sft"))


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_rates_are_those_of_transformers_after_the_warm_up(tmp_path, kind, warmup_steps):
    steps = 12
    found = trl_of(
        tmp_path, "trl-sft", lr_scheduler_type=kind, warmup_steps=warmup_steps, max_steps=steps
    )
    recipe, peak = found.recipe, 1e-3
    optimizer, own = (
        torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "peak": peak}], lr=peak)
        for _ in range(2)
    )
    scheduler = get_scheduler(kind, optimizer, warmup_steps, steps)
    theirs, ours = [], []
    for step in range(steps):
        theirs.append(optimizer.param_groups[0]["lr"])
        set_learning_rates(own, recipe, step, steps)
        ours.append(own.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert ours[warmup_steps:] == pytest.approx(theirs[warmup_steps:])
    if warmup_steps:
        assert theirs[0] == 0
        assert "a rate of 0 there" in remark(found, "warmup_steps")
        assert all(a > b for a, b in zip(ours[:3], theirs, strict=False))
    else:
        assert not remark(found, "warmup_steps")


@pytest.mark.parametrize(
    ("settings", "warmup", "warmup_steps"),
    [
        ({"warmup_ratio": 0.1, "max_steps": 4}, 0.0, None),
        ({"warmup_ratio": 0.1, "max_steps": 29}, 0.03, 2),
        ({"warmup_ratio": 0.1, "max_steps": 15}, 0.03, 2),  # of one step axolotl makes two
        ({"warmup_steps": 1}, 0.03, 2),
        ({"max_steps": 60}, 0.03, 2),
        ({"max_steps": 200}, 0.03, 6),
        ({"max_steps": 10_000}, 0.03, 100),
        ({}, 0.03, None),
        ({"warmup_ratio": 0.2}, 0.2, None),
    ],
)
def test_the_warm_up_of_axolotl_in_its_own_steps(tmp_path, settings, warmup, warmup_steps):
    recipe = axolotl_of(tmp_path, **settings).recipe
    assert (recipe.warmup, recipe.warmup_steps) == (warmup, warmup_steps)


def test_the_cpu_goes_to_the_command(tmp_path):
    trl = trl_of(tmp_path, "trl-sft", use_cpu=True)
    for found in (trl, llamafactory_of(tmp_path, use_cpu=True)):
        assert "--device cpu" in found.command()
    assert "--device" not in trl_of(tmp_path, "trl-sft", use_cpu=False).command()


def test_a_system_text_of_the_file_is_to_be_written_to_the_rows(tmp_path):
    for found, key in (
        (axolotl_of(tmp_path, default_system_message="Be brief."), "default_system_message"),
        (llamafactory_of(tmp_path, default_system="Be brief."), "default_system"),
    ):
        assert "a column system" in remark(found, key)


def test_what_mlx_weighs_in_another_way_is_told(tmp_path):
    text = "model: m\ntrain: true\nfine_tune_type: lora\niters: 8\n"
    assert "one token of padding" in str(translated(tmp_path, text))
    assert "weigh alike" not in remark(translated(tmp_path, text), "batch_size")
    several = translated(tmp_path, f"{text}grad_accumulation_steps: 2\n")
    assert "micro-batches weigh alike there" in remark(several, "batch_size")


def test_the_larger_steps_of_mlx_are_told_with_the_rate_that_comes_near(tmp_path):
    m = v = larger = 0.0
    for _ in range(8):  # of a gradient of 1, Adam's corrected step is the rate
        m, v = 0.9 * m + 0.1, 0.999 * v + 0.001
        larger += m / v**0.5 / 8
    text = "model: m\ntrain: true\niters: 8\nlearning_rate: 1e-4\n"
    told = remark(translated(tmp_path, text), "optimizer")
    assert f"{larger:.1f} times as large" in told
    assert f"--lr {larger * 1e-4:.2g} --lr-b" in told
    corrected = f"{text}optimizer_config: {{adam: {{bias_correction: true}}}}\n"
    assert not remark(translated(tmp_path, corrected), "optimizer")


@pytest.mark.parametrize("betas", [[0.9, 1.0], [0.9], 0.9])
def test_betas_of_mlx_that_are_none_are_refused(tmp_path, betas):
    text = f"model: m\niters: 8\noptimizer_config: {{adam: {{betas: {betas}}}}}\n"
    with pytest.raises(LorafoldError, match="expected two numbers from 0 to below 1"):
        translated(tmp_path, text)


def test_axolotl_packs_without_a_named_attention_as_one_text(tmp_path):
    open_rows = axolotl_of(tmp_path, sample_packing=True, flash_attention=False)
    assert open_rows.recipe.packing
    assert "rows see each other there" in remark(open_rows, "sample_packing")
    for named in ({"flash_attention": True}, {"attn_implementation": "sdpa"}):
        found = axolotl_of(tmp_path, sample_packing=True, **named)
        assert found.recipe.packing
        assert not remark(found, "sample_packing")
