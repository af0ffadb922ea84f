"""The chat template `tools`, for models whose own knows no tools: ChatML with tools and calls.

    <|im_start|>system
    ... <tools> one JSON object a line </tools> ...<|im_end|>
    <|im_start|>assistant
    <tool_call>
    {"name": "weather", "arguments": {"city": "Rome"}}
    </tool_call><|im_end|>
    <|im_start|>tool
    <tool_response>
    21 degrees
    </tool_response><|im_end|>

Reasoning stands in <think></think> before the content, in every turn, so that no turn is rewritten
when another follows. A tokenizer without the two tokens of ChatML has `### Role:` before a message
and its end-of-sequence token after it. It is a Jinja template, saved with the tokenizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafold.errors import LorafoldError
from lorafold.models.joined import opening

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOOLS = "tools"  # its name in a recipe and on the command line; a file of that name is ./tools
START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = """\
{%- macro begin(role) %}HEADER{% endmacro -%}
{%- macro end() %}{{ ENDING + '\\n' }}{% endmacro -%}
{%- set said = messages[0].content if messages[0].role == 'system' else '' -%}
{%- if tools or said -%}
{{ begin('system') + said }}
{%- if tools -%}
{{ '\\n\\n' if said else '' }}
{{- 'Functions, one JSON object a line:\\n<tools>\\n' }}
{%- for tool in tools %}{{ (tool.function or tool) | tojson + '\\n' }}{% endfor -%}
{{ '</tools>\\nTo call one, write:\\n<tool_call>\\n' }}
{{- '{"name": its name, "arguments": an object}\\n</tool_call>' }}
{%- endif -%}
{{ end() }}
{%- endif -%}
{%- for message in messages -%}
{%- if not (loop.first and message.role == 'system') -%}
{{ begin(message.role) }}
{%- if message.role == 'assistant' -%}
{%- if message.reasoning_content -%}
{{ '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
{%- endif -%}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] -%}
{{ '\\n' if message.content or not loop.first else '' }}
{{- '<tool_call>\\n{"name": ' + call.function.name | tojson + ', "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string
    else call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor -%}
{%- elif message.role == 'tool' -%}
{{ '<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- else -%}
{{ message.content }}
{%- endif -%}
{{ end() }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ begin('assistant') }}{% endif -%}"""


def with_tools(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template for this tokenizer.

    Raises LorafoldError if the tokenizer has neither ChatML's tokens nor an end-of-sequence token.
    """
    words = tokenizer.added_tokens_encoder
    if START in words and END in words:
        # a beginning of sequence that is ChatML's own stands before the role already
        before = "" if tokenizer.bos_token == START else opening(tokenizer)
        header, ending = f"{{{{ '{START}' + role + '\\n' }}}}", f"'{END}'"
    elif tokenizer.eos_token is not None:
        before = opening(tokenizer)
        header, ending = "{{ '### ' + role | capitalize + ':\\n' }}", "eos_token"
    else:
        raise LorafoldError(
            f"chat template {TOOLS}: the tokenizer has neither {START} and {END} nor an"
            " end-of-sequence token, so completions could not end; expected either"
        )
    return before + TEMPLATE.replace("HEADER", header).replace("ENDING", ending)
