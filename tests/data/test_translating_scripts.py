"""mlx-lm's files and Unsloth's scripts as recipes, and where all tools' files say that rows lie."""

import json

import pytest

from lorafold.config_import import unsloth
from lorafold.errors import LorafoldError
from lorafold.recipe.recipe import Recipe
from translation_cases import axolotl_of, keys, llamafactory_of, mlx_of, remark, unsloth_of

LORA = {"rank": 8, "scale": 20.0, "dropout": 0.1, "keys": ["self_attn.q_proj"]}


def test_mlxs_defaults_and_its_lora(tmp_path):
    found = mlx_of(tmp_path)
    assert found.tool == "mlx-lm"
    assert found.recipe == Recipe(
        rank=8, alpha=160, dropout=0.0, targets="all-linear", objective="sft", storage="auto",
        lr=1e-5, lr_b=1e-5, schedule="constant", warmup=0.0, clip=0.0, optimizer="adamw",
        steps=600, batch=4, max_length=2048, packing=False, gradient_checkpointing=False,
        eval_every=200, save_every=100,
    )  # fmt: skip
    assert "the last 16 layers" in remark(found, "num_layers")
    assert "every token" in remark(found, "mask_prompt")
    own = mlx_of(tmp_path, lora_parameters=LORA | {"alpha": 16}, num_layers=-1, mask_prompt=True)
    assert (own.recipe.targets, own.recipe.alpha) == (("self_attn.q_proj",), 160)
    assert (own.recipe.dropout, own.recipe.train_on) == (0.1, "last")
    assert not keys(own, "changed")


def test_a_script_of_unsloth_is_read_as_literals(tmp_path):
    found = unsloth_of(tmp_path)
    assert found.tool == "Unsloth"
    assert found.recipe == Recipe(
        rank=32, alpha=64, dropout=0.0, targets=tuple(unsloth.LINEARS), objective="sft",
        storage="nf4", lr=2e-4, lr_b=2e-4, schedule="linear", warmup_steps=5, weight_decay=0.001,
        optimizer="adamw8bit", epochs=3, steps=60, batch=8, accumulate=2, max_length=1024,
        packing=False,
    )  # fmt: skip
    assert remark(found, "seed") == "no literal, so that it is not read: give --seed SEED"
    assert found.command().endswith("--seed SEED")  # which is no number, so that nobody forgets it
    [told] = [line for line in found.to_yaml().splitlines() if line.startswith("# NOT READ: ")]
    assert "seed: " in told
    assert told.endswith("give --seed SEED")
    pairs = unsloth_of(tmp_path, SFT="DPO")
    assert "rows of prompt, chosen and rejected" in remark(pairs, "load_dataset.path")
    assert remark(found, "odd").startswith("it is not known here")
    counts = [e.key for e in found.entries]
    assert len(counts) == len(set(counts))
    assert "--data acme/chats" in found.command()
    assert json.loads(json.dumps(found.as_json()))["tool"] == "Unsloth"


@pytest.mark.parametrize(
    ("dataset", "flags", "said"),
    [
        ({"path": "acme/chats", "type": "chat_template"}, "--data acme/chats --out", ""),
        ({"path": "acme/chats", "type": "chat_template", "field_messages": "talk"},
         "--columns messages=talk", ""),
        ({"path": "acme/chats", "type": "chat_template", "field_messages": "talk",
          "message_property_mappings": {"role": "from", "content": "value"}},
         "--columns conversations=talk", ""),
        ({"path": "acme/chats", "type": "chat_template",
          "message_property_mappings": {"role": "who", "content": "what"}}, "", "who and what"),
        ({"path": "acme/alpaca", "type": "alpaca"}, "--data acme/alpaca", "### Instruction"),
        ({"path": "acme/text", "type": "completion", "field": "body"}, "--columns text=body", ""),
        ({"path": "json", "data_files": "a.jsonl", "ds_type": "json"}, "--data a.jsonl", ""),
        ({"path": "acme/a", "type": "chat_template.default", "field_messages": "asked",
          "field_chosen": "better", "roles": {"user": ["human"]}},
         "--columns chosen=better,prompt=asked", "roles: without a counterpart"),
        ({"path": "acme/a", "type": "alpaca", "field_messages": "m"}, "", "messages: without"),
        ({"path": "acme/a", "split": "train[:5%]"}, "--data DATA", "its split train[:5%]"),
        ({"path": "acme/a", "chat_template": "chatml", "shards": 4}, "", "shards: without a"),
        ({"path": "acme/a", "type": {"field_instruction": "q", "field_output": "a"}},
         "--columns instruction=q,output=a", "prompt form is not written"),
    ],
)  # fmt: skip
def test_axolotls_rows(tmp_path, dataset, flags, said):
    found = axolotl_of(tmp_path, datasets=[dataset], output_dir="out")
    assert flags in found.command()
    assert said in remark(found, "datasets")


def test_llamafactorys_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "not found in data/dataset_info.json" in remark(
        llamafactory_of(tmp_path, dataset="chef"), "dataset"
    )
    chats = {
        "hf_hub_url": "acme/chats", "formatting": "sharegpt", "columns": {"messages": "talk"},
        "tags": {"role_tag": "role", "content_tag": "content"},
    }  # fmt: skip
    info = {"chef": {"file_name": "chef.json"}, "chats": chats}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    found = llamafactory_of(tmp_path, dataset="chef,chats")
    assert "--data data/chef.json --data acme/chats --columns messages=talk" in found.command()
    online = llamafactory_of(tmp_path, dataset="acme/a", dataset_dir="ONLINE")
    assert "--data acme/a" in online.command()


def test_axolotls_unfrozen_parameters_with_an_adapter(tmp_path):
    every = axolotl_of(tmp_path, unfrozen_parameters=[".+lora_"])
    assert remark(every, "unfrozen_parameters") == "they are the adapter's weights"
    some = axolotl_of(tmp_path, unfrozen_parameters=["model.layers.2[0-9]+.mlp"])
    assert "axolotl freezes every weight of the adapter" in remark(some, "unfrozen_parameters")
    with pytest.raises(LorafoldError, match="full method trains the whole model"):
        axolotl_of(tmp_path, adapter=None, unfrozen_parameters=["^lm_head.weight$"])
