"""What the build of the documentation adds to its pages: what code knows better than a page.

    <!-- generated: about train -->      what a command does, and
    <!-- generated: options train -->    its options, from the command itself
    <!-- generated: recipe -->           the fields of the recipe, from `Recipe.model_fields`
    <!-- generated: methods -->          the methods, from the table of methods

The pages that are built are refused if they would load anything from another host.
"""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import typer
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from lorafold.cli import _load
from lorafold.cli.groups import OTHERS
from lorafold.step.recipe import GROUPS, Recipe

ROOT = Path(__file__).parent.parent
PICTURES = ["benchmarks/results/scaling.svg"]  # shown on pages, and kept where they are made
MARK = re.compile(r"^<!-- generated: (\w+)(?: ([\w-]+))? -->$", re.MULTILINE)
# tags that load something; links to other pages of the web (a) load nothing
REMOTE = re.compile(
    r"<(?:script|img|iframe|source|link(?![^>]*rel=\"canonical\"))\b[^>]*"
    r"(?:src|href)=\"?(?:https?:)?//"
)


def on_files(files: Files, config: Any) -> Files:
    """The pictures of the benchmarks, as if they lay among the pages."""
    for picture in PICTURES:
        path = ROOT / picture
        files.append(File.generated(config, path.name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with its marks replaced by what they stand for."""
    return MARK.sub(lambda found: GENERATED[found[1]](*filter(None, [found[2]])), markdown)


def on_post_page(output: str, page: Any, **_: Any) -> None:
    """PluginError for a page that would load something from another host."""
    if found := REMOTE.search(output):
        raise PluginError(f"{page.file.src_uri}: loads from another host: {found[0]}")


def cell(text: str) -> str:
    """Text as a cell of a table."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;")


def code(text: str) -> str:
    """Text as code in a cell."""
    return f"<code>{cell(text)}</code>"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def about(name: str) -> str:
    """What a command does, as its --help has it."""
    return inspect.cleandoc(_load(name).help)


def options(name: str) -> str:
    """The usage of a command and its options, panel by panel, as its --help has them."""
    command = _load(name)
    context = typer.Context(command, info_name=f"lorafold {name}")
    panels: dict[str, list[list[str]]] = {"Arguments": [], OTHERS: []}
    for parameter in command.get_params(context):
        if (record := parameter.get_help_record(context)) is None:
            continue
        argument = parameter.param_type_name == "argument"
        panel = getattr(parameter, "rich_help_panel", None) or OTHERS
        rows = panels.setdefault("Arguments" if argument else panel, [])
        rows.append([code(record[0]), cell(record[1])])
    parts = [f"    {command.get_usage(context)}"]
    parts += [f"**{panel}**\n\n{table(['', ''], rows)}" for panel, rows in panels.items() if rows]
    parts += [*(command.epilog or "").split("\n\n")]
    return "\n\n".join(part for part in parts if part)


def recipe() -> str:
    """The fields of the recipe, subject by subject."""
    train = _load("train")
    context = typer.Context(train, info_name="lorafold train")
    records = {p.name: p.get_help_record(context)[0] for p in train.get_params(context)}
    parts: list[str] = []
    rows: list[list[str]] = []
    for name, field in Recipe.model_fields.items():
        if name in GROUPS:
            rows = []
            parts.append("")
            title = GROUPS[name]
        default = "" if field.default is None else code(str(field.default))
        anchor = f'<span id="{name}"></span>{code(name)}'
        rows.append([anchor, code(records[name]), default, cell(str(field.description))])
        head = ["field", "option", "default", "meaning"]
        parts[-1] = f"## {title[0].upper()}{title[1:]}\n\n{table(head, rows)}"
    return "\n\n".join(parts)


def methods() -> str:
    """The methods by name, with what a run takes for each where the recipe is silent."""
    from lorafold.methods import METHODS  # needs torch

    def rows() -> Iterator[list[str]]:
        for name, maker in METHODS.items():
            made = maker.func if isinstance(maker, partial) else maker
            more = maker.keywords if isinstance(maker, partial) else {}
            call = f"lf.{made.__name__}({', '.join(f'{k}={v!r}' for k, v in more.items())})"
            spec = maker()
            what = (inspect.getdoc(inspect.getmodule(made)) or "").split("\n\n")[0]
            targets = spec.targets if len(spec.targets) < 20 else "by name, see its file"
            rate = f"{spec.lr:g}" + (f", B {spec.lr_b:g}" if spec.lr_b else "")
            yield [code(name), code(call), cell(what), cell(targets), rate]

    return table(["name", "in Python", "what it is", "targets", "learning rate"], list(rows()))


GENERATED = {"about": about, "options": options, "recipe": recipe, "methods": methods}
