"""Other tools' names for options: errors of commands, recipes, specs and `attach` suggest ours."""

import pytest
import torch

import lorafold as lf
from lorafold.advice import ELSEWHERE, OWNERS, advised
from lorafold.config_import import axolotl, llamafactory, mlx, trl
from lorafold.config_import.rules import ToolSettings
from lorafold.methods import make_spec
from lorafold.recipe.fields import Fields
from lorafold.recipe.parsing import load_recipe

TOOLS = trl.RULES | {
    "axolotl": axolotl.RULES, "llamafactory": llamafactory.RULES, "mlx": mlx.RULES
}  # fmt: skip
# a value of each name; of the others 2
VALUES = {
    "lr_scheduler_type": "cosine_with_restarts",
    "lr_scheduler": "linear",
    "optim": "adamw_bnb_8bit",
    "dtype": "float16",
    "torch_dtype": "auto",
    "target_modules": "q_proj,v_proj",
    "lora_target_modules": ["q_proj"],
    "lora_target": "all",
    "lora_modules_to_save": ["lm_head"],
    "additional_target": "lm_head",
    "report_to": ["wandb"],
    "val_set_size": 0.1,
    "val_size": 0.1,
    "test_split_size": 0.1,
    "warmup_ratio": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "lora_dropout": 0.0,  # which some turn off
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit", "bf16", "fp16", "use_dora", "use_rslora"), True
    ),
    **dict.fromkeys(("sample_packing", "neat_packing", "grad_checkpoint", "float16"), True),
    **dict.fromkeys(("bfloat16", "peft_use_dora", "peft_use_rslora"), True),
}
# a batch of completions, which depends on another key
OTHERWISE = {
    ("trl-grpo", "per_device_train_batch_size"),
    ("trl-rloo", "per_device_train_batch_size"),
}


def test_each_name_is_a_field_or_an_option_of_a_verb():
    known = {*Fields.model_fields, *OWNERS}
    assert {name for named in ELSEWHERE.values() for name in named.names} <= known


@pytest.mark.parametrize("tool", TOOLS)
def test_the_table_agrees_with_what_files_of_other_tools_become(tool):
    compared = 0
    rules = {rule.key: rule for rule in TOOLS[tool]}
    for key in rules.keys() & ELSEWHERE.keys():
        value = VALUES.get(key, 2)
        settings = ToolSettings({key: value}, {k: rule.default for k, rule in rules.items()})
        try:
            outcome = rules[key].reader(value, settings)
        except lf.LorafoldError:  # it asks for another key beside it
            continue
        fields, ours = outcome.fields if outcome else {}, ELSEWHERE[key].read(value, {key: value})
        for name in fields.keys() & ours.keys():
            compared += (tool, key) not in OTHERWISE
            assert (tool, key) in OTHERWISE or fields[name] == ours[name], key
    assert compared > 5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"learning_rate": 1e-4}, "lorafold's is lr=0.0001, lr_b=0.0001 (one rate for both"),
        ({"lora_r": "16"}, "lorafold's is rank=16"),
        ({"num_train_epochs": 3}, "lorafold's is epochs=3.0"),
        ({"load_in_4bit": True}, "lorafold's is storage='nf4'"),
        ({"load_in_4bit": "perhaps"}, "lorafold's is storage"),
        (
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
            "lorafold's is batch=8 (micro-batch times accumulation, of one process);"
            " gradient_accumulation_steps is not a field of a recipe: lorafold's is accumulate=4",
        ),
        ({"model_name_or_path": "m"}, "lorafold's is model='m' of lf.train"),
        ({"rnak": 8}, "did you mean rank?"),
    ],
)
def test_a_recipe_says_what_a_name_is_here_wherever_it_stands(tmp_path, given, said):
    with pytest.raises(lf.LorafoldError) as caught:
        lf.Recipe(**given)
    assert said in str(caught.value)
    with pytest.raises(lf.LorafoldError) as caught:
        load_recipe(None, [f"{name}={value}" for name, value in given.items()])
    assert said.split("'")[0].split(" is not")[0] in str(caught.value).replace(" (from --set)", "")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: lf.LoRA(r=8), "LoRA has no option r; lorafold's is rank=8"),
        (
            lambda: lf.LoRA(8, lora_alpha=16),
            "LoRA has no option lora_alpha; lorafold's is alpha=16.0",
        ),
        (lambda: lf.LoRA(use_rslora=True), "LoRA has no option use_rslora; did you mean rslora?"),
        (lambda: lf.VeRA(rnak=8), "VeRA has no option rnak; did you mean rank?"),
        (lambda: lf.IA3(colour=8), "IA3 has no option colour; it has: "),
        (
            lambda: lf.LoRA(target_modules=["q_proj"]),
            "lorafold's is targets=('q_proj',) of lf.attach or lf.Recipe",
        ),
        (lambda: make_spec("lora", r=8), "method lora has no option r; lorafold's is rank=8"),
        (
            lambda: lf.attach(linear(), lf.LoRA(), target_modules=["0"]),
            "attach has no option target_modules; lorafold's is targets=('0',)",
        ),
        (
            lambda: lf.attach(linear(), r=8),
            "attach has no option r; lorafold's is rank=8 of lf.LoRA",
        ),
    ],
)
def test_specs_and_attach_say_what_a_name_is_here(call, said):
    with pytest.raises(lf.LorafoldError) as caught:
        call()
    assert said in str(caught.value)
    assert isinstance(caught.value, TypeError)


def linear():
    return torch.nn.Sequential(torch.nn.Linear(3, 3))


def test_what_is_advised_is_the_same_function():
    def grown(size: int, *, by: int = 1) -> int:
        """So much larger."""
        return size + by

    assert advised(grown)(2, by=3) == 5
    assert advised(grown).__doc__ == grown.__doc__
    with pytest.raises(TypeError):  # Python's own
        advised(grown)()
