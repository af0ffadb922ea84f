"""What the documentation shows is run as it stands, page by page, each in a directory of its own.

    ```python                           run; the fences of a page share their names
    ```sh                               every line is a `lorafold` command, and is run
    ```json title="rows.jsonl"          written to the directory
    ```sh title="Not run by the tests: it needs a GPU"     shown with its reason, and not run;
                                        `lorafold` commands in it are parsed all the same

A page runs on a tiny random model in the place of the embedded one, without the commands of LONG
and the sections of COOKBOOK. The slow tests run LONG_PAGES whole on the tiny model, and REAL_PAGES,
the sections of COOKBOOK among them, on the embedded one. The pages of the commands run as one,
behind the page that has their rows.
"""

import html
import json
import os
import re
import runpy
import shlex
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lorafold as lf
from embedded_cases import embed_a_tiny_model
from lorafold.api.options import declared_options
from lorafold.cli import COMMANDS, TYPED, app, load_command
from lorafold.cli.command_line import ALIASES
from lorafold.layers import LAYERS
from lorafold.methods import METHODS
from lorafold.objectives import OBJECTIVES, algorithm_options
from lorafold.recipe.recipe import Recipe
from lorafold.training_step import policy_algorithms, preference_algorithms

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
NOT_RUN = "Not run by the tests: "
# commands that train many times, and pages with many commands
LONG = {"quickstart", "compare", "intrinsic", "fragility"}
LONG_PAGES = {
    "compare.md", "compose.md", "concepts.md", "conversations.md", "fragility.md",
    "from-unsloth.md", "inspect.md", "memory.md", "qlora.md",
}  # fmt: skip
# complete examples, which run on the embedded model alone: the exact match that their evaluation
# `after` must reach, by page and section
COOKBOOK = {
    ("classify.md", "Example: sort messages by department"): 0.9,
    ("align.md", "Example: teach a style"): 0.8,
    ("cookbook.md", "Extract JSON"): 0.8,
    ("cookbook.md", "Call tools"): 0.9,
    ("cookbook.md", "Distil a prompt"): 0.9,
}
# llama.cpp reads the embedded GGUF file itself, which is none where the model is tiny
GGUF_PAGES = {"cli.md", "export-gguf.md", "export.md"}
REAL_PAGES = sorted(GGUF_PAGES | {page for page, _ in COOKBOOK})
RUN = {"python", "sh"}  # languages; everything else is there to be read
FENCE = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
FILE = re.compile(r"[\w/.-]+\.\w+")


@dataclass(frozen=True)
class Fence:
    page: str
    line: int
    language: str
    title: str
    text: str
    section: str

    @property
    def reason(self) -> str:
        """Why it is not run; empty where it is."""
        return self.title.removeprefix(NOT_RUN) if self.title.startswith(NOT_RUN) else ""

    @property
    def file(self) -> str:
        """The file that it is the content of; empty where it is none."""
        return self.title if FILE.fullmatch(self.title) else ""

    @property
    def lines(self) -> list[list[str]]:
        """The words of each line of a shell; a backslash continues a line, # begins a comment."""
        joined = self.text.replace("\\\n", " ").splitlines()
        return [words for line in joined if (words := shlex.split(line, comments=True))]

    @property
    def commands(self) -> list[list[str]]:
        """The arguments of the `lorafold` commands in a shell's lines."""
        if self.language != "sh":
            return []
        return [words[1:] for words in self.lines if words[0] == "lorafold"]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def fences(page: str) -> Iterator[Fence]:
    text = (DOCS / page).read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        title = re.search(r'title="([^"]*)"', found[3])
        sections = SECTION.findall(text, 0, found.start())
        yield Fence(
            page,
            text.count("\n", 0, found.start()) + 2,
            found[2],
            title[1] if title else "",
            textwrap.dedent(found[4]),
            sections[-1] if sections else "",
        )


FENCES = [fence for page in PAGES for fence in fences(page)]


def fences_of(page: str) -> list[Fence]:
    """Those of a page; the command line's page is followed by those of the commands."""
    nav = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    below = re.findall(r"cli/\w+\.md", nav) if page == "cli.md" else []
    return [fence for one in (page, *below) for fence in fences(one)]


RUNNING = [
    page
    for page in PAGES
    if not page.startswith("cli/")
    and any(f.language in RUN and not f.reason for f in fences_of(page))
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A directory of packages whose embedded model is tiny, and a cache that has it unpacked."""
    packages, cache = tmp_path_factory.mktemp("packages"), tmp_path_factory.mktemp("cache")
    embed_a_tiny_model(packages, cache)
    return packages, cache


@pytest.fixture
def tables() -> Iterator[None]:
    """The tables that pages extend, which are afterwards as they were."""
    before = [(table, dict(table)) for table in (METHODS, LAYERS, OBJECTIVES)]
    yield
    for table, entries in before:
        table.clear()
        table.update(entries)


@pytest.mark.few(5)
@pytest.mark.usefixtures("tables", "unestimated")
@pytest.mark.parametrize(
    ("model", "page"),
    [
        *(("tiny", page) for page in RUNNING if page not in LONG_PAGES | GGUF_PAGES),
        *(pytest.param("whole", page, marks=pytest.mark.slow) for page in sorted(LONG_PAGES)),
        *(pytest.param("smollm2", page, marks=pytest.mark.slow) for page in REAL_PAGES),
    ],
)
def test_a_page_runs(model, page, tmp_path, monkeypatch, request) -> None:
    if model != "smollm2":
        packages, cache = request.getfixturevalue("tiny")
        monkeypatch.syspath_prepend(packages)
        path = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])
        monkeypatch.setenv("PYTHONPATH", path)  # of processes that are started
        monkeypatch.setenv("LORAFOLD_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for place, section in groupby(fences_of(page), lambda fence: (fence.page, fence.section)):
        least = COOKBOOK.get(place)
        if least is not None and model == "tiny":
            continue
        for fence in section:
            run(fence, module, LONG if model == "tiny" else set())
        if least is not None:
            assert vars(module).pop("after").exact_match >= least


def test_every_complete_example_is_on_its_page() -> None:
    assert COOKBOOK.keys() <= {(fence.page, fence.section) for fence in FENCES}


def run(fence: Fence, module: ModuleType, without: set[str]) -> None:
    if fence.file:
        Path(fence.file).parent.mkdir(parents=True, exist_ok=True)
        Path(fence.file).write_text(fence.text, encoding="utf-8")
    elif fence.reason:
        return
    elif fence.language == "python":
        code = "\n" * (fence.line - 1) + fence.text
        exec(compile(code, str(DOCS / fence.page), "exec"), vars(module))
    elif fence.language == "sh":
        for arguments in fence.commands:
            if {*arguments[:2]} & without:
                continue
            code = app(arguments, prog_name="lorafold", standalone_mode=False)
            assert code in (0, None), f"{fence}: lorafold {shlex.join(arguments)}"


@pytest.mark.parametrize("fence", FENCES, ids=str)
def test_what_is_not_run_says_why_and_its_commands_parse(fence: Fence) -> None:
    assert not fence.title.startswith("Not run") or len(fence.reason) > 5
    if fence.language == "sh" and not fence.reason:
        assert [words[0] for words in fence.lines] == ["lorafold"] * len(fence.lines)
    for arguments in fence.commands:
        if arguments and not arguments[0].startswith("-"):
            name = arguments.pop(0)
            typed = f"lab {(name := arguments.pop(0))}" if name == "lab" else name
            assert TYPED[name] == typed
            load_command(name).make_context(f"lorafold {typed}", arguments)  # TyperException if bad


def test_the_reader_is_told_what_is_not_run() -> None:
    """No other way of leaving a fence out: a language that nobody runs would be one."""
    aliases = {"bash", "shell", "console", "py", "python3", "pycon"}
    assert [str(fence) for fence in FENCES if fence.language in aliases] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_page_an_example_and_its_options(name: str) -> None:
    texts = [page.read_text(encoding="utf-8") for page in (DOCS / "cli").glob("*.md")]
    [text] = [text for text in texts if f"<!-- generated: options {name} -->" in text]
    assert re.search(rf"^##? lorafold {TYPED[name]}$", text, re.M)
    assert re.search(rf"^lorafold {TYPED[name]}\b", text, re.M)


def test_the_recipe_s_page_is_generated_from_the_recipe() -> None:
    assert "<!-- generated: recipe -->" in (DOCS / "recipe.md").read_text(encoding="utf-8")
    page = load_hooks().recipe()
    assert [name for name in Recipe.model_fields if f'id="{name}"' not in page] == []


@pytest.mark.parametrize(
    ("html", "remote"),
    [
        ('<a href="https://arxiv.org">paper</a> <img src="scaling.svg">', False),
        ('<script src="https://example.org/a.js"></script>', True),
        ("<link rel=stylesheet href=//example.org/a.css>", True),
        ('<img alt="" src="http://example.org/a.png">', True),
    ],
)
def test_a_page_that_loads_from_another_host_is_refused(html: str, remote: bool) -> None:
    pytest.importorskip("mkdocs")
    assert bool(load_hooks().REMOTE.search(html)) == remote


def test_the_table_of_methods_links_to_what_the_api_reference_has() -> None:
    pytest.importorskip("mkdocs")
    text = (DOCS / "api" / "methods.md").read_text(encoding="utf-8")
    there = set(re.findall(r"^::: (\S+)$", text, re.M))
    linked = set(re.findall(r"\(api/methods\.md#([^)]+)\)", load_hooks().methods()))
    assert len(linked) > 10
    assert linked - there == set()


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[here](#one)", ""),
        ("[a page](none.md)", "link 'none.md', but the target is not found"),
        ("[an anchor](#two)", "no such anchor"),
    ],
)
def test_make_docs_fails_for_a_dead_link(text: str, wrong: str, tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    makefile = (DOCS.parent / "Makefile").read_text(encoding="utf-8")
    [given] = re.findall(r"mkdocs (build .*)$", makefile, re.M)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Page\n\n## One\n\n{text}\n")
    own = "plugins: []\nhooks: []\ndocs_dir: docs\nsite_dir: site\nnav: [index.md]\nwatch: []\n"
    (tmp_path / "mkdocs.yml").write_text(f"INHERIT: {DOCS.parent / 'mkdocs.yml'}\n{own}")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", *given.split()],
        cwd=tmp_path, env={**os.environ, "NO_MKDOCS_2_WARNING": "true"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, wrong in done.stderr) == (int(bool(wrong)), True), done.stderr


@pytest.mark.parametrize(
    ("body", "dead"),
    [
        ('<a href="other.html#there">x</a><a href="https://example.org/none">y</a>', []),
        ('<h2 id="here"></h2><a href="#here">x</a>', []),
        ('<a href="#gone">x</a>', ["page.html: #gone"]),
        ('<a href="other.html#gone">x</a>', ["page.html: other.html#gone"]),
        ('<img src="none.png">', ["page.html: none.png"]),
    ],
)
def test_no_dead_link_of_a_built_page_is_overlooked(body: str, dead: list[str], tmp_path) -> None:
    pytest.importorskip("mkdocs")
    (tmp_path / "page.html").write_text(body)
    (tmp_path / "other.html").write_text('<p id="there">')
    assert load_hooks().sitelinks.dead(tmp_path) == dead


def test_every_method_has_a_drawing_and_an_equation() -> None:
    made = load_hooks().methods()
    assert made.count('<figure class="drawing">') == 16
    assert len(re.findall(r"^\$\$$", made, re.MULTILINE)) == 2 * 16


def test_tables_of_texts_are_stacked_on_phones_and_those_of_figures_scroll() -> None:
    pytest.importorskip("mkdocs")

    def built(*rows: tuple[str, ...]) -> str:
        head, *body = ("".join(f"<td>{cell}</td>\n" for cell in row) for row in rows)
        lines = "".join(f"<tr>\n{row}</tr>\n" for row in body)
        head = head.replace("td>", "th>")
        table = f"<table>\n<thead>\n<tr>\n{head}</tr>\n</thead>\n<tbody>\n{lines}</tbody></table>"
        return str(load_hooks().on_page_content(table))

    words = "a text of many words, which a reader reads"
    texts = built(("what", "figure", "how & why"), ("a", f"{words}, {words}", "b"), ("c", "d", ""))
    assert texts.startswith('<div class="stacked texts"><table>')
    assert re.findall('data-head="(.*?)"', texts) == ["figure", "how &amp; why"] * 2
    figures = built(("model", "speed", "memory"), (f"{words}, {words}", "1.5", "2e-4"))
    assert "stacked" not in figures
    assert '<span class="whole">2e-4</span>' in figures
    narrow, wide = (
        built(("name", "meaning"), (f"<code>{name}</code>", words + words))
        for name in ("rank", "a_name_of_a_function.that_has_no_room(beside_its_meaning)")
    )
    assert "stacked" not in narrow
    assert "stacked" in wide
    assert '<code class="long">a_name' in wide


def test_equations_are_mathml_without_tex() -> None:
    hooks = load_hooks()
    span = r'<p>The scale <span class="arithmatex">\(\alpha / r \lt 1\)</span>.</p>'
    inline = hooks.on_page_content(span)
    assert re.fullmatch(r'<p>The scale <math [^>]*display="inline">.*</math>\.</p>', inline)
    for name, (tex, symbols) in hooks.figures.EQUATIONS.items():
        texts = [tex, *re.findall(r"\$(.+?)\$", symbols)]
        spans = "".join(f'<div class="arithmatex">\\[{html.escape(t)}\\]</div>' for t in texts)
        made = hooks.on_page_content(spans)
        assert made.count("<math ") == len(texts), name
        assert not re.search(r"[\\$]", made), name
    assert hooks.figures.EQUATIONS.keys() <= hooks.figures.FIGURES.keys()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_one_title(page: str) -> None:
    text = FENCE.sub("", (DOCS / page).read_text(encoding="utf-8"))
    assert len(re.findall(r"^# \S", text, re.MULTILINE)) == 1


def test_objects_are_closed_behind_their_first_sentence() -> None:
    pytest.importorskip("mkdocs")
    objects = "".join(
        f'<div class="doc doc-object doc-class"><h3 id="{name}" class="doc doc-heading">{name}</h3>'
        f'<div class="doc doc-contents first"><p>A {name}. And more.</p></div></div>\n'
        for name in ("one", "two")
    )
    built = load_hooks().on_page_content(f"<p>Before.</p>{objects}<h2 id='b'>B</h2>")
    assert re.findall(r"</h3><details[^>]*><summary>(.*?)</summary>", built) == ["A one.", "A two."]
    assert built.count("<p>And more.</p>") == 2
    assert built.endswith("</details><h2 id='b'>B</h2>")


def test_blocks_of_text_with_columns_are_not_folded() -> None:
    pytest.importorskip("mkdocs")
    block = '<div class="language-text highlight"><pre><span></span><code>{}</code></pre></div>'
    marked = load_hooks().on_page_content(block.format("y = W x      (out, in)"))
    assert "language-text highlight columns" in marked
    assert "columns" not in load_hooks().on_page_content(block.format("error: a long message"))


def load_hooks() -> ModuleType:
    import importlib.util

    for package in ("mkdocs", "latex2mathml"):
        pytest.importorskip(package)
    if str(DOCS) not in sys.path:
        sys.path.append(str(DOCS))
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8")
LINKS = re.findall(r"\]\(([^)#]+)", TEXT)


def test_it_is_short() -> None:
    assert len(TEXT.split()) <= 650


def test_it_names_every_method_and_every_command() -> None:
    named = set(re.findall(r"`([a-z0-9-]+)`", TEXT))
    named |= set(re.findall(r"lorafold ([a-z]+)", TEXT))
    assert set(METHODS) <= named
    assert set(COMMANDS) <= named


def test_it_names_the_methods_that_do_not_run_everywhere() -> None:
    sentence = re.search(r"^Each method runs on .*?\n\n", TEXT, re.DOTALL | re.MULTILINE)
    specs = {name: make() for name, make in METHODS.items()}
    odd = {n for n, s in specs.items() if s.trains_base or s.head_alone}
    assert sentence is not None
    assert set(re.findall(r"`([a-z-]+)`", sentence[0])) == odd


@pytest.mark.parametrize("link", LINKS)
def test_its_links_lead_somewhere(link: str) -> None:
    assert (README.parent / link).exists()


FRONT = {"README.md": TEXT, "docs/index.md": (DOCS / "index.md").read_text(encoding="utf-8")}
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_the_front_pages_have_the_same_example_and_the_same_claim() -> None:
    first = [
        re.findall(r"```python\n(.*?)```\n\n```text.*?\n(.*?)```", t, re.DOTALL)
        for t in FRONT.values()
    ]
    assert first[0] == first[1]
    assert len(first[0]) == 1
    claims = [re.search(r"A LoRA step on .*?\. .*?\.(?=\*|\n)", text) for text in FRONT.values()]
    assert claims[0] is not None
    assert claims[1] is not None
    assert claims[0][0] == claims[1][0]


@pytest.mark.parametrize("page", FRONT)
def test_the_claim_was_measured(page: str) -> None:
    [scaling] = json.loads((RESULTS / "scaling.json").read_text(encoding="utf-8"))
    [table] = scaling["tables"]
    [row] = [row for row in table["rows"] if row[0] == "1 x 4096"]
    ours, peft = (float(row[table["columns"].index(name)]) for name in ("peak GB", "PEFT's peak"))
    text = " ".join(FRONT[page].split())
    assert (
        f"on 4,096 tokens takes {ours:.1f} GB of memory. With PEFT it takes {peft:.1f} GB" in text
    )
    speeds = [
        float(row[run["tables"][0]["columns"].index("speed-up")])
        for name in ("peers", "peers_qwen3")
        for run in json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        if run["processor"].startswith("AMD EPYC")
        for row in run["tables"][0]["rows"]
        if row[0].lower().startswith("lora")
    ]
    assert len(speeds) == 8
    assert f"{min(speeds):.1f} to {max(speeds):.1f} times as fast as PEFT" in text
    mean = statistics.geometric_mean(speeds)
    assert page == "README.md" or f"geometric mean {mean:.2f}" in text


def test_the_chart_is_drawn_from_the_results() -> None:
    drawn = load_hooks().figures.file()
    assert (DOCS / "memory.svg").read_text(encoding="utf-8") == drawn


@pytest.mark.slow
def test_all_blocks_of_the_readme_run_in_an_empty_folder(tmp_path: Path) -> None:
    blocks = re.findall(r"```(python|sh)[^\n]*\n(.*?)```", TEXT, re.DOTALL)
    python = "\n".join(text for language, text in blocks if language == "python")
    shell = "\n".join(t for of, t in blocks if of == "sh" and "pip" not in t)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    printed = []
    for command in ([sys.executable, "-c", python], ["bash", "-ec", shell]):
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    made = {"facts", "merged", "mine", "rows.jsonl", "my-adapter", "my-model"}
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".run"} == made
    [shown] = re.findall(r"```\n\n```text[^\n]*\n(.*?)```", TEXT, re.DOTALL)
    figures = re.compile(r"\d[\d.e-]*")  # other machines round otherwise
    assert figures.sub("0", shown) == figures.sub("0", printed[0])


ROOT = Path(__file__).parents[2]
NAMING = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{page}" for page in PAGES)]
SPAN = re.compile(r"`([^`\n]+)`")
PLACE = re.compile(r"(?:src|benchmarks|tests|docs|examples|lorafold)/[\w./*-]*|[a-z_]+/[\w/*]+\.py")
OPTION = re.compile(r"(--[a-z][\w-]*)(?:=.*)?")
# options of other programs that stand alone: pip, llama.cpp, accelerate, SLURM
THEIRS = {
    "--no-deps", "--chat-template-file", "--lora-init-without-apply", "--num_processes",
    "--signal", "--requeue", "--lora-r",
}  # fmt: skip


def options_of(command: Any) -> set[str]:
    below = getattr(command, "commands", {}).values()
    own = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
    return own.union(*map(options_of, below))


@cache
def known_options() -> frozenset[str]:
    every = set().union(*(options_of(load_command(name)) for name in COMMANDS))
    return frozenset(every | THEIRS | ALIASES.keys() | {"--help", "--help-all"})


@cache
def options_of_scripts(*scripts: str) -> frozenset[str]:
    files = [*map(ROOT.joinpath, scripts), *(ROOT / "benchmarks" / "lib").glob("*.py")]
    texts = [file.read_text(encoding="utf-8") for file in files if file.exists()]
    return frozenset(re.findall(r"--[a-z][\w-]*", "".join(texts)))


@cache
def known_fields() -> frozenset[str]:
    """Of recipes, of objectives, and the parameters of `lf.train`."""
    modules = (algorithm_options, preference_algorithms, policy_algorithms)
    classes = [c for m in modules for c in vars(m).values() if is_dataclass(c)]
    names = {field.name for c in classes for field in fields(c)}
    of_train = (one.name for one in declared_options(lf.train))
    return frozenset({*Recipe.model_fields, *of_train, *names})


def gone(page: str, text: str) -> Iterator[str]:
    """Each place, option, name of lorafold and field in a page's code spans that does not exist."""
    text = FENCE.sub("", text)
    for span in SPAN.findall(text):
        words = [word.strip(",;()'\"") for word in span.split()]
        for word in filter(PLACE.fullmatch, words):
            place = re.sub(r"\b[A-Z]{3,}\b", "*", word)  # a name to be filled in
            if not any([*(ROOT / at).glob(place)] for at in ("", "src", "src/lorafold")):
                yield word
        scripts = [word for word in words if re.fullmatch(r"benchmarks/\w+\.py", word)]
        known = known_options().union(options_of_scripts(*scripts) if scripts else ())
        if scripts or span.startswith(("lorafold ", "--")):
            yield from (m[1] for m in map(OPTION.fullmatch, words) if m and m[1] not in known)
        for name in re.findall(r"\blf\.([A-Za-z_]\w*(?:\.\w+)*)", span):
            try:
                attrgetter(name)(lf)
            except AttributeError:
                yield f"lf.{name}"
        yield from set(re.findall(r"--(?:set|vary) ([a-z]\w*)=", span)) - known_fields()
    if Path(page).name.startswith("from-"):
        last = "\n".join(re.findall(r"^\|.* \| (.*) \|$", text, re.MULTILINE))
        yield from set(re.findall(r"`(\w+)=[^`]*`", last)) - known_fields()


@pytest.mark.parametrize("page", NAMING)
def test_what_code_spans_name_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    if page == "CHANGELOG.md":  # earlier versions name what there was
        text = text.split("\n## ")[1]
    assert [*gone(page, text)] == []


@pytest.mark.parametrize(
    "text",
    ["`src/lorafold/none.py`", "`core/none.py`", "`--ranks 4`", "`lorafold train --none`",
     "`lf.none()`", "`lf.LoRA.none`", "`--set none=1`", "`benchmarks/fits.py --none`",
     "| a | `none=1` |"],
)  # fmt: skip
def test_what_does_not_exist_is_not_overlooked(text: str) -> None:
    assert len([*gone("from-peft.md", text)]) == 1


@pytest.mark.slow
def test_the_first_example_runs(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "sft_minimal.py"), run_name="__main__")
    told = re.search(r"loss ([\d.]+) at first, ([\d.]+) at last", capsys.readouterr().out)
    first, last = map(float, told.groups())
    assert last < 0.5 * first


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_was_learned(smollm2: Path, tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "examples" / "first.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # shown where it is run
    context = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, kernel_name="python3", resources=context).execute()
    cells = [cell for cell in notebook.cells if cell.source.startswith("lf.generate")]
    before, after = (cell.outputs[-1]["data"]["text/plain"] for cell in cells)
    assert "Ask Tomas." not in before
    assert "Ask Tomas." in after
    assert (tmp_path / "merged" / "config.json").exists()
