"""LLaMA-Factory's `dataset`: names of its `dataset_info.json`, which is read where it lies in
`dataset_dir`; where rows lie goes to `--data`, the names of their columns to `--columns`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorafold.files.record import read_object
from lorafold.translating.convert import names
from lorafold.translating.llamafactory_preferences import objective_of
from lorafold.translating.preferences import rows_wanted
from lorafold.translating.rows import Rows, differing, given_as_data, of_hub
from lorafold.translating.rules import Outcome, Settings, is_off

INFO = "dataset_info.json"
ONLINE = "ONLINE"  # a dataset_dir whose names are those of hub datasets
READ = {
    "hf_hub_url", "ms_hub_url", "om_hub_url", "file_name", "subset", "split", "formatting",
    "ranking", "columns", "tags",
}  # fmt: skip
# lorafold's columns by theirs, of both forms
INSTRUCTIONS = {"instruction": "prompt", "input": "query", "output": "response"}
JUDGED = {"chosen": "chosen", "rejected": "rejected", "label": "kto_tag"}
BESIDE = {"system": "system", "tools": "tools"}
LEFT = ("history", "images", "videos", "audios")


def dataset(value: Any, settings: Settings) -> Outcome:
    """`dataset` goes to `--data`, as `dataset_info.json` says where that can be read."""
    folder = Path(str(settings["dataset_dir"] or "data"))
    info = read_object(folder / INFO) if (folder / INFO).is_file() else {}
    found = [_rows(name, info.get(name), folder) for name in names(value)]
    return given_as_data(found, rows_wanted(objective_of(settings)))


def _rows(name: str, info: Any, folder: Path) -> Rows:
    if str(folder) == ONLINE:
        return Rows(name, name)
    if not isinstance(info, Mapping):
        return Rows(name, None, {}, [f"not found in {folder / INFO}"])
    file = info.get("file_name")
    path = info.get("hf_hub_url") or (str(folder / file) if file else None)
    at = of_hub(path or name, info.get("subset"), info.get("split"))
    return Rows(name, at.path if path else None, _columns(info), [*at.said, *_said(info)])


def _columns(info: Mapping[str, Any]) -> dict[str, str]:
    given = info.get("columns") or {}
    judged = info.get("ranking") or "kto_tag" in given
    ours = {name: given.get(key) for name, key in (JUDGED | BESIDE).items()}
    if info.get("formatting") != "sharegpt":
        return differing({name: given.get(key) for name, key in INSTRUCTIONS.items()} | ours)
    turns = "messages" if _is_openai(info) else "conversations"
    return differing({turns: given.get("messages") or "conversations"} | (ours if judged else {}))


def _is_openai(info: Mapping[str, Any]) -> bool:
    """Whether turns have a role and content, and not from and value."""
    tags = info.get("tags") or {}
    return (tags.get("role_tag"), tags.get("content_tag")) == ("role", "content")


def _said(info: Mapping[str, Any]) -> Iterator[str]:
    tags, given = info.get("tags") or {}, info.get("columns") or {}
    pair = (tags.get("role_tag", "from"), tags.get("content_tag", "value"))
    if pair not in (("from", "value"), ("role", "content")):
        yield f"its turns have {pair[0]} and {pair[1]}: rename them to role and content"
    others = [key for key in LEFT if given.get(key)]
    others += [key for key, value in info.items() if key not in READ and not is_off(value)]
    if others:
        yield f"{', '.join(others)}: without a counterpart"
