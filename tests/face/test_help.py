"""`--help`: few options, no Python types, examples that run; and the names of other tools."""

import io
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer

from command_cases import rows_file
from conftest import lorafold, refused
from embedded_cases import embed_a_tiny_model
from lorafold.cli import COMMANDS, EXAMPLES, GROUPS, load_command
from lorafold.cli.help import MAX_OPTIONS

NEW_KEY = "serve new-key"
ENDLESS = {"serve"}  # it serves until it is stopped; tests/serve run it
# of those that train many times the examples run with these too
SHORT = {
    "compare": "--steps 1 --batch 1 --data benign.jsonl --eval-data mine.jsonl --methods ia3",
    "intrinsic": "--steps 1 --batch 1 --data benign.jsonl --eval-data mine.jsonl",
    "fragility": "--max-new-tokens 2 --examples 1 --rank 2 --defence none",
    "export": "--no-proof",  # the tiny model stands in a file that llama.cpp can not read
}


def command_of(name: str) -> typer.core.TyperCommand:
    first, *below = name.split()
    command = load_command(first)
    return command.commands[below[0]] if below else command


def shown(name: str, option: str = "--help") -> str:
    done = lorafold(*name.split(), option)
    assert done.returncode == 0
    return done.stdout


def listed(text: str) -> set[str]:
    return set(re.findall(r"^  (?:-h, )?(--[\w-]+)", text, re.M))


def words(example: str) -> list[str]:
    return shlex.split(example.replace("\\\n", " "))[1:]


def test_the_commands_are_listed_in_groups_each_with_one_line(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text, lab = lorafold("--help").stdout, lorafold("lab", "--help").stdout
    for title, group in GROUPS.items():
        shown = lab if title == "Lab" else text
        lines = shown.partition(f"\n{title}:\n")[2].partition("\n\n")[0].splitlines()
        assert [line.split(maxsplit=1) for line in lines] == [[n, t] for n, t in group.items()]
    assert "".join(f"\n  {example}" for example in EXAMPLES) in text
    assert max(map(len, (text + lab).splitlines())) <= 80
    assert sum(len(group) for title, group in GROUPS.items() if title != "Lab") == 12
    assert "lorafold lab --help" in " ".join(text.split())


@pytest.mark.parametrize("name", GROUPS["Lab"])
def test_a_command_of_the_lab_is_also_typed_without_it(name: str) -> None:
    """As in earlier versions; whatever is shown has the name of today."""
    long, short = (" ".join(shown(typed).split()) for typed in (f"lab {name}", name))
    assert f"Usage: lorafold lab {name} " in long
    assert long.replace("lorafold lab ", "lorafold ") == short.replace("lorafold lab ", "lorafold ")


@pytest.mark.parametrize("name", [*COMMANDS, NEW_KEY])
def test_help_is_short_and_has_examples_and_no_types(name: str, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text, command = shown(name), command_of(name)
    whole = shown(name, "--help-all")
    assert len(command.examples) == 3
    for example in command.examples:
        assert "\n".join(f"  {line}" for line in example.splitlines()) in text
    assert len(listed(text)) <= MAX_OPTIONS
    assert max(map(len, (text + whole).splitlines())) <= 80
    assert re.findall(r"<[a-z]\w*(?:\[\w+\])?>", whole) == []
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    assert {p.opts[0] for p in options} <= listed(whole)
    assert ("--help-all lists" in text) == (listed(text) != listed(whole))
    assert whole.count("[repeatable]") == sum(p.multiple for p in options)


def test_train_lists_what_is_looked_for() -> None:
    asked = "--data --model --out --rank --targets --quantization --lr --epochs --batch --verbose"
    assert set(asked.split()) <= listed(shown("train"))
    assert len(listed(shown("train"))) <= 20
    assert {"--alpha", "--warmup"} <= listed(shown("train", "--help-all")) - listed(shown("train"))


@pytest.mark.parametrize("name", [*COMMANDS, NEW_KEY])
def test_examples_parse(name: str) -> None:
    for example in command_of(name).examples:
        first, *arguments = words(example.replace(" lab ", " "))
        below = arguments.pop(0) if name == NEW_KEY else ""
        command_of(f"{first} {below}").make_context("lorafold", arguments)


@pytest.fixture(scope="module")
def after_quickstart(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """What the examples need, and the environment in which the embedded model is a tiny one."""
    packages, cache = tmp_path_factory.mktemp("packages"), tmp_path_factory.mktemp("cache")
    embed_a_tiny_model(packages, cache)
    path = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])
    folder = tmp_path_factory.mktemp("run")
    pair = {"prompt": "When?", "chosen": "On Tuesday.", "rejected": "Never."}
    rows_file(folder / "pairs.jsonl", [pair] * 4)
    for name in ("refuse", "controls", "benign"):
        said = "I can't do that." if name == "refuse" else "Sure, at once."
        rows = [{"prompt": f"{name} {n}?", "completion": said} for n in range(20)]
        rows_file(folder / f"{name}.jsonl", rows)
    rows_file(folder / "mine.jsonl", [{"prompt": "When?", "completion": "Sure."}])
    (folder / "sft.yaml").write_text(
        "model_name_or_path: acme/tiny\nuse_peft: true\nlora_r: 8\nlearning_rate: 1.0e-4\n"
        "num_train_epochs: 2\nper_device_train_batch_size: 4\nassistant_only_loss: true\n"
    )
    (folder / "sft.py").write_text(
        "from unsloth import FastLanguageModel\n"
        'model, tokenizer = FastLanguageModel.from_pretrained(model_name="acme/tiny",'
        " max_seq_length=512)\n"
        "model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, packages, {"PYTHONPATH": path, "LORAFOLD_CACHE": str(cache)}, patch)
        patch.setitem(sys.modules, "xllamacpp", None)  # it can't read the tiny model's file
        for line in (
            EXAMPLES[0],
            EXAMPLES[2],
            "lorafold train --data refuse.jsonl --steps 20 --batch 4 --out policy",
            "lorafold train --data benign.jsonl --steps 2 --batch 2 --over policy --out tuned",
        ):
            assert lorafold(*words(line)).returncode == 0, line
    return folder, {"PYTHONPATH": path, "LORAFOLD_CACHE": str(cache), "PACKAGES": str(packages)}


def enter(folder: Path, packages: Path, given: dict[str, str], patch: pytest.MonkeyPatch) -> None:
    patch.syspath_prepend(packages)
    patch.chdir(folder)
    for name, value in given.items():
        patch.setenv(name, value)


@pytest.mark.slow
@pytest.mark.usefixtures("unestimated")
@pytest.mark.parametrize("name", sorted({*COMMANDS, NEW_KEY} - ENDLESS))
def test_examples_run(name: str, after_quickstart, monkeypatch) -> None:
    folder, given = after_quickstart
    enter(folder, Path(given["PACKAGES"]), given, monkeypatch)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)  # it can't read the tiny model's file
    options = {option for one in command_of(name).params for option in one.opts}
    for example in command_of(name).examples:
        typed = io.TextIOWrapper(io.BytesIO(b"a table for two\n"))
        monkeypatch.setattr(sys, "stdin", typed)
        arguments = words(example)
        for option in re.findall(r"--\S+(?: [^-]\S*)?", SHORT.get(name, "")):
            if option.split()[0] not in arguments:
                arguments += option.split()
        if "--out" in arguments and "--overwrite" in options - {*arguments}:
            arguments.append("--overwrite")  # another command's example may have the same name
        done = lorafold(*arguments)
        codes = {0, 1} if "--fail-under" in arguments else {0}  # 1: less was kept
        assert done.returncode in codes, f"{example}: {done.stderr}"


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("--lora-r 16", "--lora-r: use --rank 16"),
        ("--lora-r", "--lora-r: use --rank"),
        ("--r 8", "--r: use --rank 8"),
        ("--lora-alpha 32", "--lora-alpha: use --alpha 32"),
        ("--lora_dropout=0.1", "--lora_dropout: use --dropout 0.1"),
        ("--learning-rate 2e-4", "--learning-rate: use --lr 0.0002 --lr-b 0.0002"),
        ("--num-train-epochs 3", "--num-train-epochs: use --epochs 3"),
        ("--max-seq-length 2048", "--max-seq-length: use --max-length 2048"),
        ("--output-dir a", "--output-dir: use --out a"),
        ("--output-dir", "--output-dir: use --out"),
        ("--model-name-or-path a/b", "--model-name-or-path: use --model a/b"),
        ("--dataset-name a/b", "--dataset-name: use --data a/b"),
        ("--load-in-4bit", "--load-in-4bit: use --quantization nf4"),
        ("--load-in-8bit true", "--load-in-8bit: use --quantization int8"),
        ("--bf16", "--bf16: use --quantization bf16"),
        ("--use-dora", "--use-dora: use --method dora"),
        ("--lora-target-modules q_proj,v_proj", "use --targets q_proj --targets v_proj"),
        ("--gradient-accumulation-steps 4", "use --accumulate 4"),
        ("--num-generations 8", "--num-generations: use --objective-options group=8"),
        ("--logging-steps 5", "--logging-steps: lorafold logs the loss by itself"),
        ("--max-steps -1", "--max-steps: did you mean --steps?"),
    ],
)
def test_a_name_of_another_tool_is_told_by_its_name_here(typed: str, told: str) -> None:
    line = refused("train", "--data", "rows.jsonl", "--out", "out", *typed.split())
    assert f"error: unknown option {typed.split('=')[0].split()[0]}: " in line
    assert line.rstrip("\n").partition(" (")[0].partition(" and keeps")[0].endswith(told)


def test_names_of_another_tool_are_read_together() -> None:
    many = "--per-device-train-batch-size 4 --gradient-accumulation-steps 2 --rnak 8"
    line = refused("train", *many.split())
    assert "use --batch 8 (" in line
    assert "use --accumulate 2; unknown option --rnak: did you mean --rank?" in line


def test_an_option_that_another_command_has_is_told_with_it() -> None:
    told = "--lora-r: only lorafold train supports it, as --rank 8"
    assert told in refused("eval", "--lora-r", "8")


def test_a_value_that_reads_like_an_unknown_option_is_no_option() -> None:
    line = refused("generate", "--prompt", "--lora-r", "--zzz")
    assert line.count("unknown option") == 1
