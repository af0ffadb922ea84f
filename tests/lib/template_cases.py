"""Chat templates written after those of model families that end or begin turns in their own ways,
over the embedded model's tokenizer with the special tokens that they have.
"""

import copy
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from families import embedded

TOKEN = re.compile(r"<\|?/?[\w]+\|?>")


@dataclass(frozen=True)
class Case:
    """A template, what stands between an answer's last word and the end of what is trained, and
    what precedes the answer within it.
    """

    template: str
    end: str
    before: str = ""
    plain: tuple[str, ...] = ()  # tokens that are no special ones


def of(user: str, assistant: str, end: str = "", between: str = "", prompt: str = "") -> str:
    """A template: what opens a user's and an assistant's message, what ends the assistant's, what
    ends it where another message follows, and what the generation prompt adds.
    """
    quoted = {k: v.replace("\n", "\\n") for k, v in locals().items()}
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ '%(assistant)s' + m.content }}%(end)s"
        "{% if not loop.last %}{{ '%(between)s' }}{% endif %}"
        "{% else %}{{ '%(user)s' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '%(assistant)s%(prompt)s' }}{% endif %}"
    ).replace("%(end)s", "{{ '" + quoted["end"] + "' }}").replace(
        "%(assistant)s", quoted["assistant"]).replace("%(user)s", quoted["user"]).replace(
        "%(between)s", quoted["between"]).replace("%(prompt)s", quoted["prompt"])  # fmt: skip


EOS = "<|im_end|>"  # the embedded tokenizer's end token
CASES = {
    # the end is the role that speaks next
    "glm": Case(of("<|user|>\n", "<|assistant|>\n"), "<|user|>"),
    "glm-edge": Case(of("<|user|>\n", "\n<|assistant|>\n", between="\n"), "\n<|user|>"),
    # the end is written before the next message
    "apertus": Case(of("<|u|>", "<|a|>", between="<|a_end|>"), "<|a_end|>"),
    "hy3": Case(of("<|hy_u|>", "<|hy_a|>", between="<|hy_eos|>\n"), "<|hy_eos|>"),
    # nothing ends a turn
    "baichuan2": Case(of("<C_Q>", "<C_A>"), EOS, plain=("<C_Q>", "<C_A>")),
    "minicpm": Case(of("<用户>", "<AI>"), EOS, plain=("<用户>", "<AI>")),
    "rwkv-world": Case(of("User: ", "\n\nAssistant: ", between="\n\n"), EOS),
    "falcon-instruct": Case(of("User: ", "\nAssistant: ", between="\n"), EOS),
    "amberchat": Case(of("### Human: ", "\n### Assistant: ", between="\n"), EOS),
    "chatqa": Case(of("User: ", "\n\nAssistant: ", end="\\n", between="\n"), EOS),
    # the end is written with the turn
    "chatml": Case(of("<|im_start|>user\n", "<|im_start|>assistant\n", end="<|im_end|>\\n"), EOS),
    "two-ends": Case(of("<|u|>", "<|a|>", end="<|t_end|><|a_end|>"), "<|t_end|><|a_end|>"),
}


@cache
def tokenizer_of(case: Case) -> Any:
    """Read only: all tests share it."""
    made = copy.deepcopy(embedded())
    tokens = {t for t in TOKEN.findall(case.template) if t not in case.plain}
    made.add_tokens(sorted(tokens), special_tokens=True)
    made.chat_template = case.template
    return made
