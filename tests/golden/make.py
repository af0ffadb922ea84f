"""The script that wrote the golden set, kept for the record: it was run at commit 885f722.

    cp tests/golden/make.py tests/conftest.py /tmp/golden/ && cd /tmp/golden && python make.py

The set holds what lorafold wrote before its modules were put in a new order, and `test_golden.py`
asks of the code as it is now to read all of it. To write it again with later code would take that
meaning away, so a new format gets files of its own beside these.

    base/                  the tiny llama of conftest.py. Its weights are kept, since torch draws
                           normal numbers that differ in their last bits from one vector width to
                           another, and a fingerprint tells such bases apart
    rows.jsonl ...         the data of all runs
    recipe.yaml            as `Recipe.to_yaml` writes it
    adapters/NAME/         an adapter in PEFT's format, with lorafold.json and manifest.json
    full/, merged/         a model that was trained whole, and one that an adapter was folded into
    comparison/, search/   what `compare` and `intrinsic` keep
    expected.safetensors   the logits of each adapter and model on IDS, in fp32
    expected.json          the losses that `lorafold eval` found

All names are relative to the working directory, so that the records know no other place.
"""

import json
import subprocess
import sys
from pathlib import Path

IDS = [[1, 77, 42, 260, 298, 133]]
NEW_IDS = [[300, 77, 42, 301, 298, 301]]  # of an adapter with tokens of its own

ON_BASE = ("--model", "base", "--device", "cpu")
PLAIN = ("--set", "steps=10", "--set", "batch=4", "--storage", "fp32")
# the commands that the test gives again
RUNS = {
    "lora": (*ON_BASE, "--data", "rows.jsonl", "--config", "recipe.yaml"),
    "adalora": (
        *(*ON_BASE, "--data", "rows.jsonl", "--method", "adalora", "--storage", "fp32"),
        *("--set", "rank=2", "--set", "options.init_rank=3", "--set", "options.tfinal=0.2"),
        *("--set", "steps=40", "--set", "batch=4", "--set", "save_every=10", "--set", "keep=1"),
    ),
}
COMPARE = (
    *("compare", *ON_BASE, "--data", "rows.jsonl", "--eval-data", "held.jsonl"),
    *("--methods", "lora,ia3", "--seeds", "2", "--out", "comparison"),
    *("--set", "base=fp32", "--set", "steps=4", "--set", "batch=4", "--set", "max_length=64"),
)
SEARCH = (
    *("intrinsic", *ON_BASE, "--data", "rows.jsonl", "--eval-data", "held.jsonl"),
    *("--smallest", "8", "--largest", "64", "--share", "0.004", "--out", "search"),
    *("--set", "steps=6", "--set", "batch=4", "--set", "max_length=64", "--set", "lr=3e-2"),
)

ROWS = [{"prompt": f"Book a table for {n}", "completion": f'{{"people": {n}}}'} for n in range(24)]
LABELS = [
    {"text": text.format(n), "label": label}
    for n in range(4)
    for label, text in {
        "alarm": "Remind me in {} minutes",
        "booking": "Book a table for {}",
        "weather": "Rain in the mountains, day {}",
    }.items()
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    }
    for row in ROWS
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant'"
    " %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{%"
    " endif %}"
)

# what each adapter is trained with beside PLAIN: data, fields of the recipe
ADAPTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rslora": ("rows", ("method=rslora", "rank=2", "lr_b=3e-2")),
    "pissa": ("rows", ("method=pissa", "rank=2", "lr_b=3e-2")),
    "olora": ("rows", ("method=olora", "rank=2", "lr_b=3e-2")),
    "dora": ("rows", ("method=dora", "rank=2", "lr_b=3e-2")),
    "vera": ("rows", ("method=vera", "rank=8", "lr=5e-2", "lr_b=5e-2")),
    "loha": ("rows", ("method=loha", "rank=2", "lr=3e-2", "lr_b=3e-2")),
    "lokr": ("rows", ("method=lokr", "rank=2", "lr=3e-2", "lr_b=3e-2")),
    "ia3": ("rows", ("method=ia3", "lr=0.1")),
    "bitfit": ("rows", ("method=bitfit", "lr=2e-2")),
    "lt-sft": ("rows", ("method=lt-sft", "lr=0.1", "options.density=0.05")),
    "fish": ("rows", ("method=fish", "lr=0.1", "options.density=0.05")),
    "houlsby": ("rows", ("method=houlsby", "lr=2e-2", "lr_b=2e-2", "options.size=4")),
    "pfeiffer": ("rows", ("method=pfeiffer", "lr=2e-2", "lr_b=2e-2", "options.size=4")),
    "prompt": ("rows", ("method=prompt", "lr=0.1", "options.tokens=4")),
    "prefix": ("rows", ("method=prefix", "lr=0.3", "options.tokens=4")),
    "fastfood": ("rows", ("method=fastfood", "options.dimension=64")),
    "saved-modules": (
        "rows",
        ("rank=2", "targets=[q_proj, v_proj]", "modules_to_save=[lm_head]", "lr=1e-2"),
    ),
    "tokens": (
        "chats",
        (
            "rank=2",
            "new_tokens=['<|user|>', '<|assistant|>']",
            "chat_template=chat.jinja",
            "lr=1e-2",
            "lr_b=3e-2",
        ),
    ),
    "classifier": ("labels", ("objective=classify", "rank=2", "lr=1e-2", "lr_b=3e-2")),
    "linear-probe": ("labels", ("objective=classify", "method=linear-probe", "lr=0.1")),
}
EVALUATED = {  # the data and the options of `lorafold eval`
    "tokens": ("chats", ("--model", "base", "--adapter", "adapters/tokens")),
    "classifier": ("labels", ("--model", "base", "--adapter", "adapters/classifier")),
    "linear-probe": ("labels", ("--model", "base", "--adapter", "adapters/linear-probe")),
    "full": ("rows", ("--model", "full")),
    "merged": ("rows", ("--model", "merged")),
}


def lorafold(*arguments: str) -> str:
    """The last line that a command prints."""
    command = [sys.executable, "-m", "lorafold", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]


def evaluation(data: str, of: tuple[str, ...]) -> tuple[str, ...]:
    return (
        *("eval", *of, "--data", f"{data}.jsonl", "--storage", "fp32", "--device", "cpu"),
        *("--no-completions", "--json"),
    )


def write_inputs() -> None:
    from conftest import make_model_dir
    from lorafold.recipe.recipe import Recipe

    make_model_dir("llama", Path("base"))
    data = {"rows": ROWS, "held": ROWS[:6], "labels": LABELS, "chats": CHATS}
    for name, rows in data.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("chat.jinja").write_text(TEMPLATE)
    recipe = Recipe(
        rank=2,
        alpha=4.0,
        dropout=0.0,  # torch's dropout is drawn otherwise by other builds of it
        rank_pattern={"q_proj": 4, r"1\.mlp\.down_proj": 3},
        alpha_pattern={"v_proj": 2.0},
        options={"init": "gaussian"},
        targets=("q_proj", "v_proj", "o_proj", "down_proj"),
        storage="fp32",
        lr=3e-3,
        lr_b=1e-2,
        schedule="linear",
        warmup=0.1,
        weight_decay=0.01,
        betas=(0.9, 0.99),
        steps=40,
        batch=4,
        accumulate=2,
        max_length=64,
        save_every=10,
        keep=1,
        seed=3,
    )
    Path("recipe.yaml").write_text(recipe.to_yaml())


def logits(name: str, ids: list[list[int]]):
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    import lorafold as lf

    auto, directory, options = AutoModelForCausalLM, "base", {}
    if name in ("full", "merged"):
        directory = name
    if name in ("classifier", "linear-probe"):
        auto, options = AutoModelForSequenceClassification, {"num_labels": 3}
    model = auto.from_pretrained(directory, dtype=torch.float32, **options).eval()
    if directory == "base" and name != "base":
        lf.load(model, f"adapters/{name}")
    with torch.no_grad():
        return model(torch.tensor(ids), use_cache=False).logits


def main() -> None:
    write_inputs()
    for name, run in RUNS.items():
        lorafold("train", *run, "--out", f"adapters/{name}")
    for name, (data, fields) in ADAPTERS.items():
        sets = [word for field in fields for word in ("--set", field)]
        about = (*ON_BASE, *PLAIN, "--data", f"{data}.jsonl", "--out", f"adapters/{name}")
        lorafold("train", *about, *sets)
    for gates in ("global", "token"):
        lorafold(
            *("compose", *ON_BASE, "--how", "mixture", "--gates", gates, "--storage", "fp32"),
            *("--adapter", "adapters/lora", "--adapter", "adapters/rslora"),
            *("--examples", "rows.jsonl", "--set", "steps=10", "--set", "lr=0.1"),
            *("--out", f"adapters/mixture-{gates}"),
        )
    lorafold(
        *("compose", *ON_BASE, "--how", "ties", "--rank", "2", "--storage", "fp32"),
        *("--adapter", "adapters/lora", "--adapter", "adapters/loha", "--out", "adapters/ties"),
    )
    lorafold(
        *("train", *ON_BASE, *PLAIN, "--data", "rows.jsonl", "--method", "full", "--out", "full"),
        *("--set", "lr=1e-2"),
    )
    lorafold("merge", *ON_BASE, "--adapter", "adapters/lora", "--out", "merged")
    lorafold(*COMPARE)
    lorafold(*SEARCH)

    from safetensors.torch import save_file

    base = logits("base", IDS)
    expected = {
        name: logits(name, NEW_IDS if name == "tokens" else IDS)
        for name in [*sorted(p.name for p in Path("adapters").iterdir()), "full", "merged"]
    }
    for name, ours in expected.items():
        if ours.shape == base.shape:
            moved = (ours - base).abs().max().item()
            print(f"{name}: logits move by up to {moved:.3f}")
            assert moved > 0.02, name
    save_file(expected, "expected.safetensors")
    losses = {
        name: json.loads(lorafold(*evaluation(data, of)))["loss"]
        for name, (data, of) in EVALUATED.items()
    }
    Path("expected.json").write_text(json.dumps(losses, indent=2) + "\n")


if __name__ == "__main__":
    main()
