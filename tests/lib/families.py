"""The chat templates of model families, from the installed `trl` and from llama.cpp's repository
(`llama_cpp_templates`), each with a tokenizer that knows the special tokens in it. Nothing is
copied and nothing needs the network.
"""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

import llama_cpp_templates
from lorafold.models.built_in_templates import set_variables
from lorafold.models.sources import resolve_model
from lorafold.models.tokenizer import load_tokenizer

SPECIAL = re.compile(
    r"<\|[\w ./-]+\|?>|<[\w]+\|>|<｜[^｜<>]+｜>|<[a-z]+_of_[a-z]+>|</?s>|\[gMASK\]|<sop>"
    r"|</assistant>|<SPECIAL_\d+>"
)
TOKENS = 4096
# take a call's arguments as JSON text
TEXT_ARGUMENTS = {"deepseekv3", "meetkai-functionary-medium-v3.2"}
EMPTY_CONTENT = {  # need a content beside calls
    "deepseekv3", "deepseekv3_training", "Qwen-QwQ-32B", "Qwen-Qwen3-0.6B",
    "unsloth-mistral-Devstral-Small-2507",
}  # fmt: skip
REASONING = {  # where it is read, if not from reasoning_content: a name, a part, or the content
    "upstage-Solar-Open-100B": "reasoning",
    "unsloth-Apriel-1.5 add_thoughts=true": "thought",
    "mistralai-Ministral-3-14B-Reasoning-2512": "part",
    "HuggingFaceTB-SmolLM3-3B": "<think>\n{}\n</think>\n\n",
    "deepseek_r1_distill_training": "<think>\n{}\n</think>\n\n",
    "NVIDIA-Nemotron-Nano-v2": "{}\n</think>\n\n",  # which writes <think> itself
    "ibm-granite-granite-3.3-2B-Instruct thinking=true": "<think>\n{}\n</think>\n\n",
}
KWARGS = {  # the variables with which a template renders reasoning, or more of it
    **dict.fromkeys((
        "CohereForAI-c4ai-command-r7b-12-2024-tool_use", "Qwen-QwQ-32B", "Reka-Edge",
        "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "deepseek-ai-DeepSeek-V3.1",
        "deepseek-ai-DeepSeek-V3.2", "deepseek-ai-DeepSeek-V4", "qwen3_5_nothink",
        "deepseek-ai-DeepSeek-V4-Flash-0731", "google-gemma-4-31B-it", "llama-cpp-rwkv-world",
        "google-gemma-4-31B-it-interleaved", "poolside-Laguna-XS-2.1", "poolside-Laguna-XS.2",
    ), "enable_thinking=true"),
    "ibm-granite-granite-3.3-2B-Instruct": "thinking=true",
    "tencent-Hy3": "reasoning_effort=high",
    "unsloth-Apriel-1.5": "add_thoughts=true",
}  # fmt: skip
EOS = {  # where the template doesn't write the variable eos_token
    "ByteDance-Seed-OSS": "<seed:eos>",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "<|END_OF_TURN_TOKEN|>",
    "CohereForAI-c4ai-command-r-plus-tool_use": "<|END_OF_TURN_TOKEN|>",
    "MiniMax-M2": "[e~[",
    "MiniMax-M3": "[e~[",
    "Reka-Edge": "<sep>",
    "tencent-Hy3": "<｜hy_eos:opensource｜>",
}
PARTS = {  # take content as a list of parts only
    *("idefics3", "idefics3_training", "llava_next", "llava_next_training"),
    *("smolvlm", "smolvlm_training"),
}


@cache
def files() -> dict[str, Path]:
    """The files of templates by name: those of trl, then those of llama.cpp."""
    spec = find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    of_trl = Path(spec.submodule_search_locations[0]) / "chat_templates"
    folders = (of_trl, llama_cpp_templates.FOLDER)
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.jinja"))}


def names() -> list[str]:
    """The names of templates, some also with a variable: "Reka-Edge enable_thinking=true"."""
    with_variables = (f"{name} {KWARGS[name]}" for name in files() if name in KWARGS)
    return [*files(), *with_variables]


@cache
def embedded() -> Any:
    """The embedded model's tokenizer with its first tokens alone, which is faster to copy."""
    made = load_tokenizer(resolve_model("smollm2"))
    content = json.loads(made.backend_tokenizer.to_str())
    model = content["model"]
    model["vocab"] = {text: number for text, number in model["vocab"].items() if number < TOKENS}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    made._tokenizer = Tokenizer.from_str(json.dumps(content))
    return made


@cache
def tokenizer_of(name: str) -> Any:
    """The embedded model's tokenizer with a family's template and its special tokens."""
    made = copy.deepcopy(embedded())
    name, _, variable = name.partition(" ")
    text = files()[name].read_text(encoding="utf-8")
    made.add_special_tokens({"bos_token": "<bos>", "eos_token": EOS.get(name, "<eos>")})
    made.add_tokens(sorted(set(SPECIAL.findall(text))), special_tokens=True)
    made.chat_template = text
    if variable:
        key, value = variable.split("=")
        set_variables(made, {key: value == "true" or value})
    return made


def as_taken(name: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as the family's documentation has them, for transformers itself."""
    found, plain = copy.deepcopy(messages), name.partition(" ")[0]
    for message in found:
        if isinstance(message.get("content"), list):
            message["content"] = "".join(part["text"] for part in message["content"])
        if plain in EMPTY_CONTENT and "tool_calls" in message:
            message["content"] = message.get("content") or ""
        if plain in TEXT_ARGUMENTS:
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        if name in PARTS and isinstance(message.get("content"), str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        key = REASONING.get(name, REASONING.get(plain, ""))
        thought = message.get("reasoning_content")
        if thought and key == "part":
            text = [{"type": "text", "text": message["content"]}] * bool(message.get("content"))
            message["content"] = [{"type": "thinking", "thinking": thought}, *text]
        elif thought and "{}" in key and "tool_calls" not in message:
            message["content"] = key.replace("{}", thought) + message["content"]
        elif thought and key:
            message[key] = thought
    return found
