"""The built-in chat templates, and default values for variables of templates.

    none     <bos> content content <eos> content content <eos>, for base models and for prompts that
             contain all their formatting; <bos> if the tokenizer adds it to texts, <eos> after
             assistant turns
    tools    ChatML with tools and calls, for models whose own template has none:
             <tools> one JSON object a line </tools> in the system turn, <tool_call> {...}
             </tool_call>, <tool_response> ... </tool_response>

In `tools`, every assistant turn keeps its reasoning, in <think></think> before the content, so that
a later turn never changes an earlier one. For a tokenizer without ChatML's tokens, messages start
with `### Role:`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NONE = "none"  # the name in recipes and options; a file of this name is ./none
JOINED_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
TOOLS = "tools"  # likewise
START, END = "<|im_start|>", "<|im_end|>"
# the variables that transformers passes
PASSED_VARIABLES = {"messages", "tools", "documents", "add_generation_prompt"}
JINJA_GLOBALS = {"raise_exception", "strftime_now", "range", "dict", "namespace", "lipsum",
                 "cycler", "joiner"}  # fmt: skip


def joined_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template `none` for this tokenizer."""
    if tokenizer.eos_token is None:
        raise LorafoldError(
            f"chat template {NONE}: the tokenizer has no end-of-sequence token, so completions"
            " could not end; use a chat template that ends them"
        )
    return bos_expression(tokenizer) + JOINED_TEMPLATE


def bos_expression(tokenizer: PreTrainedTokenizerBase) -> str:
    """A Jinja expression for the BOS token; empty if the tokenizer does not add BOS to texts."""
    first = tokenizer("a").input_ids[:1] if tokenizer.bos_token is not None else []
    return "{{ bos_token }}" if first == [tokenizer.bos_token_id] else ""


def tools_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template `tools` for this tokenizer."""
    words = tokenizer.added_tokens_encoder
    if START in words and END in words:
        # ChatML's header already contains this BOS token
        before = "" if tokenizer.bos_token == START else bos_expression(tokenizer)
        header, ending = f"{{{{ '{START}' + role + '\\n' }}}}", f"'{END}'"
    elif tokenizer.eos_token is not None:
        before = bos_expression(tokenizer)
        header, ending = "{{ '### ' + role | capitalize + ':\\n' }}", "eos_token"
    else:
        raise LorafoldError(
            f"chat template {TOOLS}: the tokenizer has neither {START} and {END} nor an"
            " end-of-sequence token, so completions could not end; use another chat template"
        )
    template = Path(__file__).with_suffix(".jinja").read_text(encoding="utf-8").removesuffix("\n")
    return before + template.replace("HEADER", header).replace("ENDING", ending)


def set_variables(tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any]) -> None:
    """Sets default values for variables of the tokenizer's chat templates."""
    if tokenizer.chat_template is None:
        raise LorafoldError(
            f"template_kwargs: found {', '.join(values)}, but the model has no chat template; set"
            " one with --chat-template"
        )
    own = variables_of(tokenizer)
    if strange := [name for name in values if name not in own]:
        raise LorafoldError(
            f"template_kwargs: found {', '.join(strange)}, which the chat template does not use;"
            f" expected {', '.join(sorted(own)) or 'none, because the template has no variables'}"
        )
    before = "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(name, value)} %}}"
        "{%- endif %}"
        for name, value in values.items()
    )
    rewrite_templates(tokenizer, before.__add__)


def rewrite_templates(tokenizer: PreTrainedTokenizerBase, rewritten: Callable[[str], str]) -> None:
    template = tokenizer.chat_template
    tokenizer.chat_template = (
        {name: rewritten(text) for name, text in template.items()}
        if isinstance(template, dict)
        else rewritten(template)
    )


def template_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    template = tokenizer.chat_template
    return [*template.values()] if isinstance(template, dict) else [template]


def variables_of(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The variables of the tokenizer's chat templates that users may set."""
    known = {name for text in template_texts(tokenizer) for name in _variables_read(text)}
    return known - PASSED_VARIABLES - JINJA_GLOBALS - set(tokenizer.special_tokens_map)


def _variables_read(template: str) -> set[str]:
    """The variables that a template reads, including variables for which it defines a default."""
    from jinja2 import Environment, TemplateSyntaxError, meta, nodes

    # remove transformers' own tag, which Jinja can't parse
    text = re.sub(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}", "", template)
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except TemplateSyntaxError as error:
        raise LorafoldError(
            f"chat template: line {error.lineno}: {error.message}; fix the template to set"
            " template_kwargs"
        ) from error
    tests = [test for test in tree.find_all(nodes.Test) if test.name in ("defined", "undefined")]
    asked = {test.node.name for test in tests if isinstance(test.node, nodes.Name)}
    return meta.find_undeclared_variables(tree) | asked


def _literal(name: str, value: Any) -> str:
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
            " number, a string, or a list or object of these"
        )
    return json.dumps(value, ensure_ascii=False)
