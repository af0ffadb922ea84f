"""Mistakes as people type them. Each is told in one line of fewer than 300 characters, which says
what was found and what to do, with exit code 2, and leaves nothing behind.

A command begins with TRAIN or ON where it is a good one but for what follows: `ON no.jsonl` trains
on that file.
"""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import lorafold
from lorafold.cli import COMMANDS
from mistake_cases import fill, seen

Typed = Callable[[str], tuple[list[str], int]]
LONGEST = 300
TRAIN = "train --model base --data rows.jsonl --out out"
ON = "train --model base --out out --data"
SHORT = {"TRAIN": TRAIN, "ON": ON}

WORDS = {
    "trian": "did you mean train?",
    "finetune --data rows.jsonl": "lorafold's is lorafold train",
    "fuse": "lorafold's is lorafold merge",
    "infer adapter": "lorafold's is lorafold generate",
    "dpo": "lorafold's is lorafold train --objective dpo",
    "help train": "lorafold's is lorafold train --help",
    "zzz": "unknown command zzz: lorafold --help lists all",
    "--no-such-option": "unknown option --no-such-option: lorafold --help lists all",
    "serve adapter": "expected --adapters adapter",
    "serve newkey": "did you mean new-key?",
    "train": "missing --data TEXT and --out PATH; see lorafold train --help",
    "train rows.jsonl": "expected --data rows.jsonl --out PATH",
    "train --data rows.jsonl --out": "--out: found no value, expected --out PATH",
    "recipe axolotl.yaml": "expected --from axolotl.yaml",
    "generate adapter hello": "missing --prompt TEXT",
    "fragility adapter": "missing --refuse PATH and --controls PATH",
    "quickstart demo": "found demo without an option",
    "cache clear": "found clear without an option; did you mean --clear?",
    "serve new-key --tenant acme": "it is given without a name, as in lorafold serve new-key acme",
    "TRAIN \u2014rank 8": "did you mean --rank?",
    "TRAIN --targets q_proj v_proj": "before each: --targets q_proj --targets v_proj",
    "ON rows.jsonl mixed.jsonl": "before each: --data rows.jsonl --data mixed.jsonl",
    "generate adapter --prompt a table for two": "expected quotes: --prompt 'a table for two'",
    "TRAIN --lr2e-4": "did you mean --lr 2e-4?",
    "TRAIN --rnak 8": "did you mean --rank?",
    "TRAIN --max_length 64": "lorafold's is --max-length",
    "TRAIN --checkpoint-every 10": "did you mean --eval-every or --save-every?",
    "TRAIN --lora-r 16": "lorafold's is --rank 16",
    "TRAIN --load-in-4bit": "lorafold's is --storage nf4",
    "TRAIN --micro-batch-size 2": "lorafold's is --batch 2",
    "TRAIN --iters 100": "lorafold's is --steps 100",
    "TRAIN --wandb": "lorafold train --help-all lists all",
    "generate adapter --prompt hello --temp 0.7": "did you mean --temperature?",
    "generate adapter --prompt hello --top-p 0.9": "lorafold generate --help lists all",
    "generate adapter --prompt hello --adapter-path adapter": "did you mean --adapter?",
    "serve --adapter adapter": "did you mean --adapters?",
    "serve --adapters adapter --lora-modules a=b": "lorafold's is --adapters DIR",
    "merge adapter --out out --dtype float16": "merged weights keep the dtype of the files",
    "compare --data rows.jsonl --model base --out out --method dora": "did you mean --methods?",
    "export adapter --to gguf --outtype q8_0 --out out": "lorafold's is --tensors",
    "doctor --adapter adapter": "lorafold doctor --help lists all",
}
TWICE = {
    "serve --adapters adapter --adapters of-other": "found adapter and of-other, expected it once",
    "serve new-key acme --keys a --keys b": "--keys: found a and b, expected it once",
    "eval adapter --data rows.jsonl --data mixed.jsonl": "see lorafold eval --help",
    "TRAIN --rank 8 --rank 16": "--rank: found 8 and 16, expected it once",
    "TRAIN --packing --no-packing": "--packing: found on and off, expected it once",
    "TRAIN --config recipe.yaml --config rnak.yaml": "found recipe.yaml and rnak.yaml",
    "merge adapter --adapter adapter --out out": "expected all adapters in one of the two ways",
}
VALUES = {
    "TRAIN --rank eight": "--rank: found 'eight', expected a whole number",
    "TRAIN --rank 0": "rank: found 0 (from --rank), expected greater than or equal to 1",
    "TRAIN --alpha -16": "alpha: found -16.0",
    "TRAIN --dropout 50%": "expected a number; did you mean 0.5?",
    "TRAIN --epochs 0": "epochs: found '0'",
    "TRAIN --epochs all": "expected a number or 'auto'",
    "TRAIN --steps -1": "steps: found -1",
    "TRAIN --steps 1e3": "did you mean 1000?",
    "TRAIN --steps --batch 4": "--steps: found '--batch', expected a whole number",
    "TRAIN --lr 1e3": "lr: found 1000, expected at most 1",
    "TRAIN --lr 0,0002": "did you mean 0.0002?",
    "TRAIN --accumulate 3": "expected a divisor of batch, which is 8",
    "TRAIN --betas 0.9": "--betas: found too few values, expected --betas NUMBER NUMBER",
    "TRAIN --packing maybe": "found 'maybe' (from --packing), expected on or off or 'auto'",
    "TRAIN --storage 4bit": "storage: found '4bit' (from --storage), expected 'nf4'",
    "TRAIN --method qlora": "unknown method 'qlora'; there are: lora",
    "TRAIN --objective sfft": "objective: found 'sfft'",
    "TRAIN --beta 0.1": "beta: the objective sft has no such option",
    "TRAIN --device gpu": "device: found 'gpu', expected cpu, cuda",
    "train --data none.jsonl --out out --set rnak=8": "did you mean rank?",
    "TRAIN --options init=guassian": "found 'guassian', expected kaiming or gaussian",
    "eval adapter --data rows.jsonl --max-length 1": "--max-length: found '1', expected at least 2",
    "generate adapter --prompt hello --storage fp4": "storage fp4: unknown; expected auto",
    "merge adapter --out out --rounding up": "expected auto, nearest, stochastic",
    "export adapter --to ggml --out out": "--to: found 'ggml', expected one of peft, gguf",
    "compose adapter adapter --out out --weight 1,2": "repeat the option for several",
    "resize adapter --energy 90 --out out": "found 90, expected a share above 0, at most 1",
    "resize adapter --out out": "--rank, --energy: found neither",
    "estimate --params seven": "expected one of 7b",
    "estimate --model base --device-memory 24": "did you mean 24GB?",
    "estimate --model base --compute-capability ampere": "expected two numbers such as 8.0",
    "estimate --model base --device cpu --compute-capability 8.0": "found --device cpu too",
    "export adapter --model base --to gguf --tensors Q9 --out out": "expected F32, F16, BF16, Q8_0",
    "cache --kind nope": "--kind nope: expected one of digests",
    "serve --adapters adapter --port 99999": "--port: found '99999', expected at most 65535",
}
ROWS = {
    "ON row.jsonl": "there is no such file; did you mean rows.jsonl?",
    "intrinsic --data row.jsonl --model base --out out": "did you mean rows.jsonl?",
    "ON rows.jsonl,mixed.jsonl": "one --data names one file, a directory or a pattern",
    "ON rows.jsonl:0": "found weight 0, expected a number above 0",
    "ON empty.jsonl": "no rows found, expected at least one",
    "ON header.csv": "no rows found, expected at least one",
    "ON empty": "found no file of rows, expected .jsonl",
    "ON pdfs": "a.pdf (of no kind that is read)",
    "ON rows.txt": "found a .txt file, expected .jsonl",
    "ON excel.xlsx": "found a spreadsheet, expected rows; save it as CSV in UTF-8",
    "ON excel.csv": "found a spreadsheet or another zip file",
    "ON page.csv": "found a PDF, expected rows",
    "ON page.jsonl": "found a web page, expected rows",
    "ON pointer.parquet": "git lfs pull fetches it",
    "ON zipped.jsonl": "expected a name that ends with .gz",
    "ON plain.jsonl.gz": "found no gzip, as its name says",
    "ON german.csv --columns prompt=frage,completion=Antwrt":
        "did you mean --columns prompt=Frage,completion=Antwort?",
    "ON german.csv": "did you mean --columns prompt=Frage,completion=Antwort",
    "ON german.jsonl": "row 1: not UTF-8 at byte 14; save the file as UTF-8",
    "ON trailing.json": "line 3: not JSON: found a comma with nothing after it",
    "ON commas.jsonl": "rows 1 to 2: not JSON: found a comma after the object",
    "ON list.jsonl": "found a list, expected an object a line; name the file .json",
    "ON lists.jsonl": "rows 1 to 2: found a list, expected an object",
    "ON pretty.jsonl": "found a list, expected an object a line; name the file .json",
    "ON python.jsonl": "found single quotes, expected double ones",
    "ON ends.jsonl": "row 2: not JSON: found no end of the text that begins at column 17",
    "ON mixed.jsonl": "row 2: format {messages}, but row 1 has {prompt, completion}",
    "ON null.jsonl": "row 2: field completion: found null, expected a value",
    "ON number.jsonl": "row 1: field completion: found 2, expected text",
    "ON labels.jsonl": "which are for --objective classify",
    "ON labels.jsonl --objective dpo": "--objective dpo expects rows of {prompt, chosen, rejected}",
    "ON prompts.jsonl": "keys found: 'prompt'; expected one of {messages}",
    "ON speech.jsonl": "field messages: found text, expected a list of messages",
    "ON columns.jsonl": "did you mean --columns prompt=question,completion=answer",
    "ON columns.jsonl --columns question=prompt,answer=completion":
        "NAME=COLUMN is --columns prompt=question,completion=answer",
    "ON columns.jsonl --columns question": "expected NAME=COLUMN",
    "ON quote.csv": "not CSV after line 1: a quote is not closed",
    "ON ragged.csv": "found 3 values, expected 2 as in the header; a text with such a mark stands",
    "ON twice.csv": "header: found 'prompt' more than once",
    "ON headless.csv": "a guess by their order, if the file begins with names",
    "ON base": "config.json: row 1: keys found",
}  # fmt: skip
THINGS = {
    "train --data rows.jsonl --out out --model adapter":
        "model adapter: this is an adapter, expected a model, as its base is: --model ",
    "train --data rows.jsonl --out out --model empty": "found no config.json in it",
    "train --data rows.jsonl --out out --model smolm2": "did you mean smollm2?",
    "train --data rows.jsonl --out out --model acme/none": "HF_HUB_OFFLINE is set",
    "train --data rows.jsonl --out out --model https://huggingface.co/acme/none":
        "did you mean acme/none?",
    "TRAIN --revision main": "leave --revision out",
    "estimate --model none": "model none: not on this machine",
    "generate --model wordless --prompt hello": "it has no tokenizer",
    "eval adaptr --data rows.jsonl": "there is none on this machine; did you mean adapter?",
    "eval base --data rows.jsonl": "it is a model, which is given as --model base",
    "eval adapter/adapter_config.json --data rows.jsonl": "its directory is adapter",
    "eval cut --data rows.jsonl": "adapter_model.safetensors: 19748 bytes, expected 19848: damaged",
    "chat none": "found no adapter_config.json, expected the directory of an adapter",
    "compose adapter of-other --out out": "adapters of different bases",
    "merge of-other --model base --out out": "not the base it was trained on",
    "inspect": "ADAPTER: found none, expected the directory of a saved adapter",
    "inspect adapter cut": "expected exactly one",
    "history base": "found no lorafold.json, expected what `lorafold train` wrote",
    "inspect adapter --model base --directions no.safetensors": "there is no such file",
    "extract --tuned base --model base --rank 4 --out out": "there is nothing to extract",
    "TRAIN --init-adapter of-other": "not the base it was trained on",
    "TRAIN --over of-other": "not the base it was trained on",
    "TRAIN --init-adapter base": "it is a model, which is given as --model base",
    "TRAIN --init-adapter adapter --rank 8": "--init-adapter fixes these fields",
    "TRAIN --over none": "there is none on this machine",
    "TRAIN --reward regex:a": "the objective sft takes none",
    "TRAIN --objective grpo": "found no reward, expected one or several",
    "ON prompts.jsonl --objective grpo --reward rewards.py":
        "reward 'rewards.py': expected FILE.py:fn",
    "ON prompts.jsonl --objective grpo --reward reward.py:good":
        "found no file {room}/reward.py, expected one; did you mean {room}/rewards.py?",
    "ON prompts.jsonl --objective grpo --reward regex:(": "it is no regular expression",
    "eval adapter --data rows.jsonl --group 2": "group: expected none without rewards",
    "generate adapter --prompt hello --tools tools.json": "found an object, expected a list of",
    "serve": "--adapters: expected it, as in --adapters DIR",
    "serve --adapters none": "found no directory, expected one",
    "serve --adapters adapter --model base --host 0.0.0.0": "so that keys are needed: make",
    "serve --adapters adapter --model base --keys keys.json": "new-key writes it",
    "serve --adapters adapter --config serve.yaml": "prot: unknown, expected one of host",
    "serve --adapters adapter --model base --port {port}": "--port 0 takes a free one",
}  # fmt: skip
RECIPES = {
    "TRAIN --config none.yaml": "can't be read as a recipe: No such file or directory",
    "TRAIN --config rnak.yaml": "rnak (from rnak.yaml) is not a field of a recipe: did you mean",
    "TRAIN --config axolotl.yaml": "lorafold recipe --from axolotl.yaml reads other tools' files",
    "TRAIN --config adapter/adapter_config.json": "which are no fields of a recipe",
    "TRAIN --config unsloth.py": "lorafold recipe --from unsloth.py reads other tools' files",
    "TRAIN --config list.yaml": "found a list",
    "TRAIN --config binary.yaml": "can't be read as a recipe: it is no text in UTF-8",
    "TRAIN --config tab.yaml": "not YAML at line 2, column 1",
    "TRAIN --config empty": "can't be read as a recipe: Is a directory",
    "recipe --from empty.yaml": "found an empty file, expected a training configuration",
    "recipe --from list.yaml": "found a list, expected `name: value` lines",
    "recipe --from binary.yaml": "it is no text in UTF-8",
    "recipe --from recipe.yaml": "train with: lorafold train --config recipe.yaml",
    "recipe --from axolotl.yaml --kind trl": "kind 'trl': expected axolotl",
}
PLACES = {
    "train --model base --data rows.jsonl --out there": "choose another name, or remove it",
    "train --model base --data rows.jsonl --out there --overwrite": "did not write",
    "train --model base --data rows.jsonl --out rows.jsonl": "exists and is not a directory",
    "train --model base --data rows.jsonl --out rows.jsonl/a": "can't be written",
    "train --model base --data rows.jsonl --out .": "expected the name of a new directory",
    "merge adapter --model base --out adapter": "adapter exists; pass --overwrite to replace it",
    "merge adapter --model base --out adapter --overwrite": "it would replace adapter",
    "resize cut --rank 2 --out cut --overwrite": "cut: adapter_model.safetensors: 19748 bytes",
    "extract --tuned base --model base --rank 2 --out there": "choose another name",
    "quickstart --out there": "pass --overwrite to replace what an earlier quickstart wrote",
    "inspect adapter --html there": "there: found a directory, expected the name of a file",
    "inspect adapter --html none/page.html": "found no directory",
    "recipe --from axolotl.yaml --out there": "found a directory, expected a file",
    "score adapter --data same.jsonl --out there": "there is a directory; expected a new file",
    "TRAIN --html page.html": "--html writes the page of --preview",
}
MISTAKES = {**WORDS, **TWICE, **VALUES, **ROWS, **THINGS, **RECIPES, **PLACES}
# after a notice or two, such as how a template is read: what needs the model or the rows
LATE = {
    "TRAIN --targets q_proj,v_proj": "several names are a list: --targets q_proj --targets v_proj",
    "TRAIN --targets layers.1.self_attn.q_proj": "matches no whole path of a module; .*layers.1",
    "TRAIN --chat-template chatml": "expected a file with a Jinja template",
    "TRAIN --chat-template broken.jinja": "line 1: unexpected '}'",
    "ON same.jsonl --objective dpo": "found the same text, expected two that differ",
    "ON asked.jsonl": "they have no answer of an assistant that may train",
    "eval adapter --data labels.jsonl": "lorafold train --objective classify makes one",
    "score adapter --data same.jsonl": "lorafold train --objective reward makes one",
    "train --model other --data rows.jsonl --out out --init-adapter adapter":
        "not the base it was trained on",
    "eval of-other --data rows.jsonl --model base": "not the base it was trained on",
    "compose adapter adapter --out adapter --overwrite": "it would replace adapter, which is read",
    "export adapter --to ggfu --out out": "--to: found 'ggfu', expected one of peft, gguf",
    "export adapter --to peft --out adapter --overwrite": "it would replace adapter, which is read",
    "compose adapter adapter --out out --how tise": "expected one of linear",
    "resize adapter --rank 2 --out adapter --overwrite": "it would replace adapter",
}
# what is taken as it is, and said
SAID = {
    "ON german.csv --columns prompt=Frage,completion=Antwort --preview":
        "no UTF-8, so it is read as Windows-1252, as Excel saves CSV: 'öffnet'",
    "ON nulls.csv --preview": "1 texts of completion are 'NULL' alone, which is read as that word",
    "TRAIN --preview --config empty.yaml": "empty.yaml: it says nothing, so the defaults hold",
    "recipe --from unsloth.py": "get_peft_model.r: rank",
}  # fmt: skip


@pytest.fixture(scope="module")
def room(tiny_model_dir, tmp_path_factory) -> Path:
    return fill(tmp_path_factory.mktemp("room"), tiny_model_dir("llama"), tiny_model_dir("gpt2"))


@pytest.fixture(scope="module")
def before(room: Path) -> set[tuple[str, int, int]]:
    return seen(room)


@pytest.fixture
def typed(room: Path, before: set[tuple[str, int, int]], monkeypatch) -> Iterator[Typed]:
    """Runs a command in the directory, which stays as it is: what is on stderr, and the code."""
    monkeypatch.chdir(room)

    def run(command: str) -> tuple[list[str], int]:
        first, _, rest = command.partition(" ")
        done = lorafold(*f"{SHORT.get(first, first)} {rest}".split())
        return done.stderr.splitlines(), done.returncode

    yield run
    assert seen(room) == before


def is_told(line: str, phrase: str) -> bool:
    return line.startswith("error: ") and len(line) < LONGEST and phrase in line


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_told_in_one_line(command: str, room: Path, typed: Typed) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        asked = command.replace("{port}", str(taken.getsockname()[1]))
        [line], code = typed(asked)
    assert is_told(line, MISTAKES[command].replace("{room}", str(room))), line
    assert code == 2


@pytest.mark.parametrize("command", LATE)
def test_what_is_found_later_is_told_last(command: str, typed: Typed) -> None:
    [*notices, line], code = typed(command)
    assert is_told(line, LATE[command]), line
    assert [one for one in notices if "error" in one or "no estimate" in one] == []
    assert code == 2


@pytest.mark.parametrize("command", SAID)
def test_what_is_taken_as_it_is_is_said(command: str, typed: Typed) -> None:
    lines, code = typed(command)
    assert [line for line in lines if SAID[command] in line] != []
    assert code == 0


def test_all_commands_are_mistyped() -> None:
    firsts = {SHORT.get(c.split()[0], c).split()[0] for c in {**MISTAKES, **LATE}}
    assert COMMANDS.keys() - firsts == set()
