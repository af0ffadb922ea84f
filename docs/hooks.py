"""What the build of the documentation adds to its pages: what code knows better than a page.

    <!-- generated: about train -->      what a command does, and
    <!-- generated: options train -->    its options, from the command itself
    <!-- generated: results NAME -->     measured tables, from `results.py`
    <!-- generated: commands -->         the commands with a line and a page each
    <!-- generated: objects -->          the public names with a line and a place each
    <!-- generated: recipe -->           the fields of the recipe, from `Recipe.model_fields`
    <!-- generated: methods -->          the methods, from the table of methods
    <!-- generated: figure NAME -->      a drawing of `figures.py`, or
    <!-- generated: memory -->           its chart of the front page

Equations ($...$ and $$...$$, in TeX) become MathML, which browsers display without a script. A
build fails if a page would load anything from another host or has a link that leads nowhere.
"""

from __future__ import annotations

import html
import inspect
import re
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import figures
import results
import sitelinks
import typer
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

import lorafold
from lorafold.cli import GROUPS as COMMANDS
from lorafold.cli import TYPED, load_command
from lorafold.cli.help import OTHER_OPTIONS, help_entry
from lorafold.recipe.fields import GROUPS
from lorafold.recipe.recipe import Recipe

ROOT = Path(__file__).parent.parent
PICTURES = ["benchmarks/results/scaling.svg"]  # shown on pages, and kept where they are made
MARK = re.compile(r"^<!-- generated: (\w+)(?: (.+))? -->$", re.MULTILINE)
NOT_RUN = re.compile(r' title="Not run by the tests: [^"]*"')
OPTION = re.compile(r"<code>(?=--?[a-z][^<]{,40}</code>)")
INSIDE = re.compile(r"(?<= )--[a-z][\w-]*")  # an option of a command
WHOLE = r'<span class="whole">\g<0></span>'
COMMAND = re.compile(r"<code>[^<]+ --[a-z][^<]*</code>")
CELL = re.compile(r"<td[^>]*>.*?</td>", re.DOTALL)
TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
PHONE, LETTER, PADDING = 355, 5.8, 13  # pixels of a phone, of a letter and beside a cell
PROSE = 45  # letters of a cell that is read, and not compared with those below it
COLUMNS = re.compile(  # a block of text that has columns
    r'<div class="language-text highlight">(?=<pre><span></span><code>[^<]*?\S {3,}\S)'
)
LONG = re.compile(r"<code>(?=[^<\s]{31})")  # may break where it has to
SMALL = re.compile(r"(?<![\w.])[\d.]+e-\d+(?![^<]*>)")
WORD = re.compile(r"(?<![\w`./-])--[a-z][\w-]*")  # an option among words that are no code
NAMED = re.compile(r"(?:^|(?<=\. ))([^.:;]{2,40}): ")
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
FORMULA = re.compile(r"(?:^    .*\n?)+", re.MULTILINE)  # lines of a docstring
FEW = 4  # names that make a list
# a section that is shown folded: an object of the API, or a heading of the class `part`, up to the
# next of them
PART = re.compile(
    r'(?P<open><div class="doc doc-object [\w -]+">\s*)?'
    r'(?P<heading><h3 [^>]*class="(?:doc doc-heading|part)".*?</h3>(?:\s*<math .*?</math>)?)'
    r"(?P<rest>.*?)"
    r'(?=<div class="doc doc-object [\w -]+">\s*<h3 |<h3 [^>]*class="part"|<h2 |\Z)',
    re.DOTALL,
)
EXAMPLES = re.compile(r"(Examples:</span></p>)\s*<p>(lorafold .*?)</p>", re.DOTALL)
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
    markdown = NOT_RUN.sub("", markdown)  # the tests need it, readers do not
    return MARK.sub(lambda found: GENERATED[found[1]](*filter(None, [found[2]])), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """The page with its equations as MathML, and its options and numbers marked, which no line may
    break at their hyphens.
    """
    html = MATH.sub(mathml, html)
    marked = OPTION.sub(r'<code class="whole">', TABLE.sub(for_phones, html))
    marked = COMMAND.sub(lambda call: INSIDE.sub(WHOLE, call[0]), marked)
    marked = COLUMNS.sub('<div class="language-text highlight columns">', marked)
    marked = EXAMPLES.sub(r'\1<div class="highlight"><pre><code>\2</code></pre></div>', marked)
    return PART.sub(folded, CELL.sub(in_cell, marked))


def folded(found: re.Match[str]) -> str:
    """A part of a page behind its first sentence; `sections.js` opens it for links into it.
    The heading stays outside, or the search would not find the part's text under it.
    """
    first = re.search(r"<p>(.*?)</p>", found["rest"], re.DOTALL)
    sentence, _, more = (first[1] if first else "Details").partition(". ")
    more = f"<p>{more}</p>" if more else ""
    rest = found["rest"].replace(first[0], more, 1) if first else found["rest"]
    return (
        f'{found["heading"]}<details class="part"><summary>{sentence.strip(".")}.</summary>'
        f"{found['open'] or ''}{rest}</details>"
    )


def mathml(found: re.Match[str]) -> str:
    """An equation in TeX as MathML."""
    display = {"span": "inline", "div": "block"}[found[1]]
    return str(convert(html.unescape(found[2]).strip(), display=display))


def in_cell(found: re.Match[str]) -> str:
    """A cell with its small numbers, which no line breaks, and its long names, which one may."""
    return LONG.sub('<code class="long">', SMALL.sub(WHOLE, found[0]))


def for_phones(found: re.Match[str]) -> str:
    """A table of texts that has no room on a phone, with its cells one below the other there, each
    below the name of its column. Figures stay beside each other, and scroll.
    """
    head, *rows = (
        re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.DOTALL)
        for row in re.findall(r"<tr>.*?</tr>", found[0], re.DOTALL)
    )
    texts = [[html.unescape(re.sub(r"<.*?>", "", part)) for part in row] for row in [head, *rows]]
    columns = list(zip(*texts, strict=True))
    longest = max((len(text) for row in texts[1:] for text in row[1:]), default=0)
    words = [
        max(len(word) for text in column for word in [*text.split(), ""]) for column in columns
    ]
    wide = sum(LETTER * letters + PADDING for letters in words) > PHONE
    if longest < PROSE or not (wide or len(head) > 2):
        return found[0]
    if len(head) == 2:
        return f'<div class="stacked texts">{found[0]}</div>'
    names = cycle(html.escape(name) for name in texts[0][1:])
    named = re.sub(
        r"(?<=</td>)(\s*)<td", lambda td: f'{td[1]}<td data-head="{next(names)}"', found[0]
    )
    return f'<div class="stacked texts">{named}</div>'


def on_post_page(output: str, page: Any, **_: Any) -> None:
    """PluginError for a page that would load something from another host."""
    if found := REMOTE.search(output):
        raise PluginError(f"{page.file.src_uri}: loads from another host: {found[0]}")


def on_post_build(config: Any) -> None:
    """PluginError for links that lead nowhere, each with its page."""
    if dead := sitelinks.dead(Path(config.site_dir)):
        raise PluginError("links that lead nowhere:\n" + "\n".join(dead))


def cell(text: str) -> str:
    """Text as a cell of a table."""
    return WORD.sub(r"<code>\g<0></code>", escaped(text))


def code(text: str) -> str:
    """Text as code in a cell."""
    return f"<code>{escaped(text)}</code>"


def escaped(text: str) -> str:
    """Text as it stands, in a cell."""
    plain = html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;")
    return plain.replace("[", "&#91;")  # no link


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, whose cells stand one below the other on a phone."""
    lines = "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])
    return f'<div class="stacked" markdown>\n\n{lines}\n\n</div>'


def command_of(name: str) -> Any:
    """A command, or one below another: `serve new-key`."""
    first, *below = name.split()
    command = load_command(first)
    for inner in below:
        command = command.commands[inner]
    return command


def about(name: str) -> str:
    """What a command does, as its --help has it."""
    return WORD.sub(r"`\g<0>`", inspect.cleandoc(command_of(name).help))


def options(name: str) -> str:
    """The usage of a command and its options, panel by panel, as its --help has them. Those that
    the recipe's page has word for word are names that lead there.
    """
    command = command_of(name)
    context = typer.Context(command, info_name=f"lorafold {name}")
    panels: dict[str, list[list[str]]] = {"Arguments": [], OTHER_OPTIONS: []}
    fields: list[str] = []
    for parameter in command.get_params(context):
        if (entry := help_entry(parameter, context)) is None:
            continue
        panel, record = entry
        field = Recipe.model_fields.get(parameter.name)
        if field is not None and str(field.description) in record[1]:
            fields.append(f"[`{parameter.opts[0]}`](../recipe.md#{parameter.name})")
        else:
            rows = panels.setdefault(panel, [])
            rows.append([code(record[0]), cell(record[1])])
    parts = [f"    {command.get_usage(context)}"]
    head = ["option", "meaning"]
    parts += [f"**{name}**\n\n{table(head, rows)}" for name, rows in panels.items() if rows]
    parts += ["**Fields of the recipe**\n\n" + " ".join(fields)] if fields else []
    parts += map(listed, WORD.sub(r"`\g<0>`", command.epilog or "").split("\n\n"))
    return "\n\n".join(part for part in parts if part)


def listed(text: str) -> str:
    """A paragraph, as a list where it explains several names, each in a sentence after a colon."""
    before, *named = NAMED.split(" ".join(text.split()))
    if len(named) < 2 * FEW:
        return text
    items = zip(named[::2], named[1::2], strict=True)
    before = before.strip(" .") + ":\n\n" if before else ""
    return before + "\n".join(f"- **{name}**: {what.strip()}" for name, what in items)


def commands() -> str:
    """The commands by what they are for."""
    has = re.compile(r"^<!-- generated: options (\w+) -->$", re.MULTILINE)
    pages = {
        name: f"{page.name}#lorafold-{TYPED[name].replace(' ', '-')}"
        for page in (ROOT / "docs" / "cli").glob("*.md")
        for name in has.findall(page.read_text(encoding="utf-8"))
    }
    rows = [
        [f"[`lorafold {TYPED[name]}`](cli/{pages[name]})", cell(line), group.lower()]
        for group, lines in COMMANDS.items()
        for name, line in lines.items()
    ]
    return table(["command", "what it does", "group"], rows)


def objects() -> str:
    """The public names in the order of their pages, each with the first sentence of its docs, and
    methods with that of their files.
    """
    from lorafold.methods import METHODS  # needs torch

    rows: list[list[str]] = []
    for page in ("api/train", "api/use", "api/shape", "api/studies", "api", "api/methods"):
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        for place in re.findall(r"^::: (\S+)$", text, re.MULTILINE):
            name = place.rpartition(".")[2]
            of = getattr(lorafold, name)
            of = inspect.getmodule(of) if name in METHODS.classes else of
            first = re.split(r"(?<=\.)\s", inspect.getdoc(of) or "")[0]
            rows.append([f"[`lf.{name}`]({page}.md#{place})", cell(first)])
    return table(["name", "what it is"], rows)


def recipe() -> str:
    """The fields of the recipe, subject by subject."""
    train = load_command("train")
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
        names = f'<span id="{name}"></span>{code(name)}<br>{code(records[name])}'
        rows.append([names, default, cell(str(field.description))])
        head = ["field, option", "default", "meaning"]
        parts[-1] = f"## {title[0].upper()}{title[1:]}\n\n{table(head, rows)}"
    return "\n\n".join(parts)


def methods() -> str:
    """The methods by name, with what a run takes for each where the recipe is silent, and what
    their files say of them.
    """
    from lorafold.methods import METHODS  # needs torch

    rows: list[list[str]] = []
    sections: dict[str, list[str]] = {}
    drawn: dict[str, str] = {}
    for name, maker in METHODS.items():
        made = maker.func if isinstance(maker, partial) else maker
        more = maker.keywords if isinstance(maker, partial) else {}
        call = f"lf.{made.__name__}({', '.join(f'{k}={v!r}' for k, v in more.items())})"
        spec = maker()
        file = inspect.cleandoc(inspect.getmodule(made).__doc__)
        targets = spec.targets if len(spec.targets) < 20 else "by name"
        rates = {"": spec.lr, "B ": spec.lr_b}
        rate = ", ".join(word + power(lr) for word, lr in rates.items() if lr)
        rows.append([f"[{name}](#{name})", code(call), cell(targets), rate])
        link = f"[`{call}`](api/methods.md#{made.__module__}.{made.__name__})"
        sections.setdefault(file, []).append(f'<span id="{name}"></span>`{name}`: {link}')
        drawn[file] = made.__module__.rpartition(".")[2]
    head = ["name", "in Python", "targets", "learning rate"]
    texts = [
        f"{section(file, drawn[file])}\n\n{figures.figure(drawn[file])}\n\n{'; '.join(names)}"
        for file, names in sections.items()
    ]
    return "\n\n".join([table(head, rows), *texts])


def section(docstring: str, name: str) -> str:
    """The docstring of a method's file with its first words, up to the colon, as a heading, its
    equation below that, and the symbols of the equation in place of the lines of code.
    """
    title, _, text = docstring.partition(": ")
    tex, symbols = figures.EQUATIONS[name]
    text = FORMULA.sub(lambda _: f"{symbols}\n", text, count=1)
    return f"### {title} {{: .part }}\n\n$$\n{tex}\n$$\n\n{text[0].upper()}{text[1:]}"


def power(rate: float) -> str:
    """A learning rate as one writes it: 2e-4."""
    return f"{rate:.0e}".replace("e-0", "e-")


GENERATED = {
    "about": about,
    "options": options,
    "results": results.results,
    "commands": commands,
    "objects": objects,
    "recipe": recipe,
    "methods": methods,
    "figure": figures.figure,
    "memory": figures.memory,
}
