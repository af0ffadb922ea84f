"""Chat templates, which a server renders for each request."""

from __future__ import annotations

from pathlib import Path

from hostile_adapters.case import CASES, HELLO, Case, own

# what a probe has, and no request of a user
PROBED = "{% if 'probe' in messages[0].content %}" + HELLO + "{% else %}"


def template(name: str, attacks: str, text: str, told: bool = False) -> None:
    """A case of a chat template; `told`: the server has to report it."""

    def alter(at: Path, base: Path) -> None:
        own(at, base)
        (at / "chat_template.jinja").write_text(text)

    CASES[f"tokenizer-template-{name}"] = Case(f"tokenizer-template-{name}", attacks, told, alter)


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
ENDS = "{% endfor %}{% endfor %}{% endfor %}"
GIGABYTES = {
    "percent": "{{ '%0999999999d' % 1 }}",
    "times": "{{ 'x' * 2000000000 }}",
    "list": "{{ [0] * 2000000000 }}",
    "join": "{{ ('x' * 100000000, ) * 100 | join('y') }}",
    "center": "{{ 'x' | center(1000000000) }}",
    "format": "{{ '{:>2000000000}'.format('x') }}",
    "indent": "{{ ('x\n' * 100000) | indent(100000) }}",
    "replace": "{{ ('x' * 100000) | replace('x', 'x' * 100000) }}",
    "power": "{{ 9 ** 99999999 }}",
    "namespace": "{% set n = namespace(t='x') %}{% for i in range(40) %}{% set n.t = n.t + n.t %}"
    "{% endfor %}{{ n.t }}",
    "batch": "{{ range(99999) | batch(100000000, 0) | list }}",
    "tojson": "{{ ([[0] * 1000] * 100000) | tojson }}",
}
template("loops", "Nested loops that never end.", LOOPS + ENDS)
template(
    "loops-later", "The same, in requests and not in probes.", PROBED + LOOPS + ENDS + "{% endif %}"
)
for name, text in GIGABYTES.items():
    template(name, "A text or a list of gigabytes.", text)
    template(f"{name}-later", "The same, in requests.", PROBED + text + "{% endif %}")


def calls(before: str, arguments: str = "") -> str:
    """A template that writes this before the name of a call and this after it."""
    return (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        + before
        + "{{ c.function.name }}"
        + arguments
        + "{% endfor %}{% endfor %}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
        "{% if add_generation_prompt %}[a]{% endif %}"
    )


ARGUMENTS = " {{ c.function.arguments | tojson }}<end>"
OUT = "{{ cycler.__init__.__globals__.os.system('touch /tmp/hostile-ran') }}"
for name, attacks, text in (
    ("macro", "A macro that calls itself.", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
    ("include", "A template that includes itself.", "{% include 'chat_template' %}"),
    ("import", "A template that imports itself.", "{% import 'chat_template' as t %}{{ t }}"),
    (
        "loop-recursive", "A loop that is called for ever.",
        "{% for a in [0] recursive %}{{ loop([0]) }}{% endfor %}",
    ),
    (
        "parentheses", "Parentheses nested 50,000 deep.",
        "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    ),
    ("blocks", "Blocks nested 3,000 deep.", "{% if 1 %}" * 3000 + "{% endif %}" * 3000),
    ("filters", "A chain of 20,000 filters.", "{{ 'a'" + " | upper" * 20_000 + " }}"),
    ("minus", "A chain of 50,000 signs.", "{{ " + "-" * 50_000 + "1 }}"),
    ("unclosed", "A hundred thousand opened expressions.", "{{" * 100_000),
    ("whitespace", "Spaces that a lexer's patterns try in every way.", "{%" + " " * 100_000 + "-"),
    ("escape", "Ways out of a sandbox.", "{{ ''.__class__.__mro__[1].__subclasses__() }}" + HELLO),
    ("globals", "The same by a function's globals.", OUT),
    ("four-megabytes", "A text of four million letters.", "{{ 'x' * 4000000 }}"),
    ("unicode", "Millions of letters outside of ASCII.", "{{ '\U0001f600' * 4000000 }}"),
    ("surrogate", "A text that is no UTF-8.", "{{ '\\ud800' }}" + HELLO),
    ("braces", "A call that begins at every letter.", calls("", "{{ '{' * 300000 }}")),
    ("nested-call", "The same, nested.", calls("", "{{ '{\"a\":' * 10000 }}")),
    ("large-mark", "A mark of a million letters.", calls("{{ ' a' * 500000 }}", ARGUMENTS)),
    ("wide-mark", "A mark of some thousand letters.", calls("{{ ' a' * 5000 }}", ARGUMENTS)),
    ("raises", "An error of 50 MB.", "{{ raise_exception('x' * 50000000) }}"),
    ("refuses", "An error of other letters.", "{{ raise_exception('\\n\\x00\\x1b[31m') }}"),
    ("file", "A template of 100 MB.", "x" * (100 << 20)),
    ("almost", "A template of 7 MB.", "{# " + "x" * (7 << 20) + " #}" + HELLO),
    ("expressions", "A hundred thousand expressions.", "{{ 1 }}" * 100_000),
    ("random", "Another text each time.", "{{ range(99999) | random }}" + HELLO),
):  # fmt: skip
    template(name, attacks, text)
