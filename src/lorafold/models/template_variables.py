"""Values for the variables of a chat template, set in the template itself.

    {%- if enable_thinking is not defined %}{%- set enable_thinking = false %}{%- endif %}...

So everything that renders with the tokenizer later, in this package and in others, has them without
being told, and whoever passes another value still gets it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# what transformers passes itself
GIVEN = {"messages", "tools", "documents", "add_generation_prompt"}
GLOBALS = {"raise_exception", "strftime_now", "range", "dict", "namespace", "lipsum", "cycler",
           "joiner"}  # fmt: skip


def set_variables(tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any]) -> None:
    """Give variables of the tokenizer's chat template values.

    Raises LorafoldError for a variable that the template never reads, and for a value that is
    neither true, false, null, a number, text, nor a list or object of these.
    """
    if not values:
        return
    template: Any = tokenizer.chat_template
    if template is None:
        raise LorafoldError(
            f"template_kwargs: found {', '.join(values)}, but the model has no chat template that"
            " could read it; --chat-template sets one"
        )
    named = template if isinstance(template, dict) else {"default": template}
    own = variables_of(tokenizer)
    if strange := [name for name in values if name not in own]:
        raise LorafoldError(
            f"template_kwargs: found {', '.join(strange)}, which the chat template never reads;"
            f" expected {', '.join(sorted(own)) or 'none, as it has no variables'}"
        )
    before = "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(name, value)} %}}"
        "{%- endif %}"
        for name, value in values.items()
    )
    found = {name: before + text for name, text in named.items()}
    tokenizer.chat_template = found if isinstance(template, dict) else found["default"]


def variables_of(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The variables of the tokenizer's chat templates that a caller may set. Raises LorafoldError
    for a template that can't be parsed.
    """
    template: Any = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template]
    known = {name for text in texts for name in _read(text)}
    return known - GIVEN - GLOBALS - set(tokenizer.special_tokens_map)


def _read(template: str) -> set[str]:
    """The variables that a template reads, those included that it sets where they are absent."""
    from jinja2 import Environment, TemplateSyntaxError, meta, nodes

    # transformers has a tag that Jinja does not know
    text = re.sub(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}", "", template)
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except TemplateSyntaxError as error:
        raise LorafoldError(
            f"the chat template: line {error.lineno}: {error.message}, so template_kwargs can't be"
            " set"
        ) from error
    tests = [test for test in tree.find_all(nodes.Test) if test.name in ("defined", "undefined")]
    asked = {test.node.name for test in tests if isinstance(test.node, nodes.Name)}
    return meta.find_undeclared_variables(tree) | asked


def _literal(name: str, value: Any) -> str:
    """The value as Jinja writes it."""
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_literal(name, inner) for inner in value) + "]"
    if isinstance(value, dict):
        pairs = (f"{json.dumps(str(k))}: {_literal(name, inner)}" for k, inner in value.items())
        return "{" + ", ".join(pairs) + "}"
    if not isinstance(value, bool | int | float | str):
        raise LorafoldError(
            f"template_kwargs.{name}: found {type(value).__name__}, expected true, false, null, a"
            " number, text, or a list or object of these"
        )
    return json.dumps(value, ensure_ascii=False)
