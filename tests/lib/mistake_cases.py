"""A directory of what people have lying around when they mistype."""

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

from adapter_cases import make_adapter

PAIR = {"prompt": "Book a table for 4", "completion": '{"people": 4}'}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
ASKED = {"messages": CHAT["messages"][:1]}
CHOSEN = {"prompt": "a", "chosen": "b", "rejected": "b"}
LABELLED = {"text": "good", "label": "pos"}
GERMAN = "Frage;Antwort\nWann öffnet ihr?;Um acht.\n"
LINE = f"{json.dumps(PAIR)}\n"
AXOLOTL = "base_model: a/b\nadapter: lora\nlora_r: 8\nlora_alpha: 16\nmicro_batch_size: 2\n"
UNSLOTH = """
from unsloth import FastLanguageModel
model, words = FastLanguageModel.from_pretrained(model_name="a/b", max_seq_length=512)
model = FastLanguageModel.get_peft_model(model, r=rank, lora_alpha=2 * rank)
"""


def lines(*rows: Any) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def fill(room: Path, base: Path, other: Path) -> Path:
    """Fill the directory; `base` is the model of most adapters in it."""
    for name, model in (("base", base), ("other", other)):
        (room / name).symlink_to(model)
    make_adapter(base, room / "adapter")
    make_adapter(other, room / "of-other")
    shutil.copytree(room / "adapter", room / "cut")
    weights = room / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(base, room / "wordless", ignore=shutil.ignore_patterns("*token*"))
    for folder in ("empty", "there", "pdfs"):
        (room / folder).mkdir()
    texts: dict[str, str] = {
        "rows.jsonl": LINE * 8,
        "rows.txt": "a\n",
        "empty.jsonl": "",
        "header.csv": "prompt,completion\n",
        "trailing.json": '[\n{"prompt": "a", "completion": "b"},\n]\n',
        "commas.jsonl": LINE.replace("\n", ",\n") * 2,
        "list.jsonl": json.dumps([PAIR] * 3),
        "lists.jsonl": lines(["a", "b"]) * 2,
        "pretty.jsonl": json.dumps([PAIR] * 3, indent=1),
        "python.jsonl": f"{PAIR}\n",
        "ends.jsonl": f'{LINE}{{"prompt": "a", "comple',
        "mixed.jsonl": lines(PAIR, CHAT),
        "null.jsonl": lines(PAIR, PAIR | {"completion": None}),
        "number.jsonl": lines(PAIR | {"completion": 2}),
        "labels.jsonl": lines(LABELLED, LABELLED | {"label": "neg"}),
        "same.jsonl": lines(CHOSEN),
        "asked.jsonl": lines(ASKED),
        "prompts.jsonl": lines({"prompt": "a"}),
        "speech.jsonl": lines({"messages": "user: a\nassistant: b"}),
        "columns.jsonl": lines({"question": "a", "answer": "b"}),
        "page.jsonl": "<!DOCTYPE html>\n<html></html>\n",
        "pointer.parquet": "version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 1\n",
        "plain.jsonl.gz": LINE,
        "nulls.csv": "prompt,completion\na,NULL\nb,c\n",
        "quote.csv": 'prompt,completion\n"a,b\nc,d\n',
        "ragged.csv": "prompt,completion\na,b,c\n",
        "twice.csv": "prompt,prompt\na,b\n",
        "headless.csv": "When do you open?,At eight.\nHow much?,Ten.\n",
        "recipe.yaml": "rank: 8\n",
        "rnak.yaml": "rnak: 8\n",
        "axolotl.yaml": AXOLOTL,
        "unsloth.py": UNSLOTH,
        "empty.yaml": "",
        "list.yaml": "- rank: 8\n",
        "tab.yaml": "rank: 8\n\tlr: 1\n",
        "serve.yaml": "prot: 80\n",
        "broken.jinja": "{% for m in messages %}{{ m.content }",
        "rewards.py": "def good(completion):\n    return 1.0\n",
        "keys.json": "{",
        "tools.json": '{"name": "f"}',
        "there/notes.txt": "mine",
        "pdfs/a.pdf": "%PDF",
    }
    for name, text in texts.items():
        (room / name).write_text(text, encoding="utf-8")
    contents: dict[str, bytes] = {
        "excel.xlsx": b"PK\x03\x04",
        "excel.csv": b"PK\x03\x04\xff\0",
        "page.csv": b"%PDF-1.7\n%\xe2\xe3\n",
        "zipped.jsonl": gzip.compress(LINE.encode()),
        "german.csv": GERMAN.encode("cp1252"),
        "german.jsonl": lines(PAIR).replace("Book", "Büro").encode("cp1252"),
        "binary.yaml": bytes(range(256)),
        "none.safetensors": b"",
    }
    for name, content in contents.items():
        (room / name).write_bytes(content)
    return room


def seen(room: Path | str) -> set[tuple[str, int, int]]:
    """Every file and folder, with its size and when it was written."""
    found = set()
    with os.scandir(room) as entries:
        for entry in entries:
            about = entry.stat(follow_symlinks=False)
            found.add((entry.path, about.st_size, about.st_mtime_ns))
            if entry.is_dir(follow_symlinks=False):
                found |= seen(entry.path)
    return found
