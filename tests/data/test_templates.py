"""Training sees the prompts of generation, for the chat templates in `trl` and in llama.cpp."""

from __future__ import annotations

from typing import Any

import pytest

from conversation_cases import HOW, ROME, ROWS, said, starting_points, trained_texts
from families import KWARGS, as_taken, names, tokenizer_of
from llama_cpp_templates import FOLDER
from lorafold.data import chat_template
from lorafold.data.chat_template import GENERATION, template_of
from lorafold.data.examples import NO_LOSS, Example, encode, encode_row
from lorafold.data.formats import format_of
from lorafold.data.render import Rendering, TrainedRenderings, render_trained
from lorafold.errors import LorafoldError

MARKING = {name for name in names() if GENERATION.search(tokenizer_of(name).chat_template)}
CALLS_END = (  # where calls end otherwise than answers
    "<|END_ACTION|><|END_OF_TURN_TOKEN|>", "<|observation|>", "<|eom_id|>", "<|call|>", "<|calls|>",
    "<tool_call|>", "<|tool_response>", "<|end_of_msg|>",
)  # fmt: skip
# What families do: examples of the row with two plain turns (2: earlier turns are rewritten, or
# have another end), with tools, with thinking, with both; "-": refused. Then how many of the turns
# with reasoning have it hidden by the template, and the end of a turn.
FAMILIES = {
    "cohere": "1 - 1 -, 2, <|END_OF_TURN_TOKEN|>",
    "cohere2": "1 - 1 -, 2, <|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "deepseek_r1_distill": "2 - 2 -, 0, <｜end▁of▁sentence｜>",
    "deepseekv3": "2 - 2 -, 0, <｜end▁of▁sentence｜>",
    "diffusion_gemma": "1 1 2 2, 0, <turn|>",
    "gemma": "1 - 1 -, 2, <end_of_turn>",
    "gemma3": "1 - 1 -, 2, <end_of_turn>",
    "gemma4": "1 1 1 2, 2, <turn|>",
    "gemma4_v2": "1 1 1 1, 2, <turn|>",
    "gemma4_v3": "1 1 1 2, 2, <turn|>",
    "gemma4_v4": "1 1 1 2, 2, <turn|>",
    "gemma4_v5": "1 1 2 2, 0, <turn|>",
    "glm4moe": "1 1 2 2, 0, <|user|>",
    "gptoss": "2 2 2 2, 0, <|return|>",
    "idefics3": "1 - 1 -, 2, <end_of_utterance>",
    "lfm2": "1 - 1 -, 2, <|im_end|>",
    "lfm2_2_5": "1 1 2 2, 0, <|im_end|>",
    "lfm2_2_5_v2": "1 1 2 2, 0, <|im_end|>",
    "lfm2_2_5_vl": "1 1 2 2, 0, <|im_end|>",
    "lfm2_v2": "1 1 1 1, 2, <|im_end|>",
    "llama3": "1 - 1 -, 2, <|eot_id|>",
    "llama3_1": "1 1 1 1, 2, <|eot_id|>",
    "llama3_2": "1 1 1 1, 2, <|eot_id|>",
    "llava_next": "1 - 1 -, 2, </s>",
    "muse_glimmer": "1 1 1 1, 0, <|eot|>",
    "nemotron_3_5_lightning": "2 3 2 2, 0, <|im_end|>",
    "nemotron_3_nano": "2 3 2 2, 0, <|im_end|>",
    "nemotron_3_super": "2 3 2 2, 0, <|im_end|>",
    "nemotron_3_ultra": "2 3 2 2, 0, <|im_end|>",
    "phi3": "2 - 2 -, 2, <|end|>\n<eos>",
    "phi3_5": "2 - 2 -, 2, <|end|>\n<eos>",
    "qwen2_5": "1 1 1 1, 2, <|im_end|>",
    "qwen2_5_vl": "1 - 1 -, 2, <|im_end|>",
    "qwen3": "2 3 2 2, 0, <|im_end|>",
    "qwen3_5_nothink": "2 2 2 3, 2, <|im_end|>",
    "qwen3_5_think": "2 2 2 2, 0, <|im_end|>",
    "qwen3_6": "2 2 2 2, 0, <|im_end|>",
    "qwen3_8": "1 1 1 1, 0, <|im_end|>",
    "qwen3_instruct_2507": "1 1 1 1, 2, <|im_end|>",
    "qwen3_vl": "1 1 1 1, 2, <|im_end|>",
    "smolvlm": "1 - 1 -, 2, <end_of_utterance>",
    "Apertus-8B-Instruct": "1 3 1 3, 2, <|assistant_end|>",
    "Apriel-1.6-15b-Thinker-fixed": "2 3 2 3, 0, \n<|end|>",
    "Bielik-11B-v3.0-Instruct": "1 2 1 1, 0, <|im_end|>",
    "ByteDance-Seed-OSS": "1 1 1 1, 0, <seed:eos>",
    "Cohere2MoE": "2 3 1 1, 0, <|END_TEXT|><|END_OF_TURN_TOKEN|>",
    "CohereForAI-c4ai-command-r-plus-tool_use": "- - - -, 0, <|END_OF_TURN_TOKEN|>",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use":
        "2 3 2 3, 2, <|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "GLM-4.6": "1 1 2 2, 0, <|user|>",
    "GLM-4.7-Flash": "2 3 2 2, 0, <|user|>",
    "GigaChat3-10B-A1.8B": "1 1 1 1, 2, <|message_sep|>",
    "GigaChat3.1-10B-A1.8B": "1 1 1 1, 2, <|message_sep|>",
    "HuggingFaceTB-SmolLM3-3B": "1 - 1 -, 0, <|im_end|>",
    "Kimi-K2-Instruct": "1 - 1 -, 2, <|im_end|>",
    "Kimi-K2-Thinking": "1 - 1 -, 1, <|im_end|>",
    "Kimi-K3": "1 1 1 1, 0, <|close|>response<|sep|><|close|>message<|sep|><|end_of_msg|>",
    "LFM2-8B-A1B": "1 - 1 -, 2, <|im_end|>",
    "LFM2.5-8B-A1B": "1 1 2 2, 0, <|im_end|>",
    "LFM2.5-Instruct": "1 - 1 -, 2, <|im_end|>",
    "MiMo-VL": "1 1 1 1, 2, <|im_end|>",
    "MiniMax-M1": "1 1 1 1, 2, <end_of_sentence>",
    "MiniMax-M2": "2 3 2 2, 0, [e~[",
    "MiniMax-M3": "1 1 1 1, 0, [e~[",
    "Mistral-Small-3.2-24B-Instruct-2506": "1 2 1 2, 2, <eos>",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "2 3 2 2, 0, <|im_end|>",
    "NVIDIA-Nemotron-Nano-v2": "2 3 2 3, 0, \n<SPECIAL_12>",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "- 2 - 2, 0, <|im_end|>",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "- 2 - 2, 0, <|im_end|>",
    "Qwen-QwQ-32B": "2 3 2 3, 2, <|im_end|>",
    "Qwen-Qwen2.5-7B-Instruct": "1 1 1 1, 2, <|im_end|>",
    "Qwen-Qwen3-0.6B": "2 3 2 2, 0, <|im_end|>",
    "Qwen3-Coder": "1 1 1 1, 2, <|im_end|>",
    "Qwen3.5-4B": "2 2 2 2, 0, <|im_end|>",
    "Reka-Edge": "1 1 1 1, 2, \n\n<sep>",
    "Spark2.5": "2 3 1 1, 0, <｜end▁of▁sentence｜>",
    "StepFun3.5-Flash": "2 2 2 2, 0, <|im_end|>",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "2 - 2 -, 0, <｜end▁of▁sentence｜>",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "2 - 2 -, 2, <｜end▁of▁sentence｜>",
    "deepseek-ai-DeepSeek-V3.1": "1 - 1 -, 2, <｜end▁of▁sentence｜>",
    "deepseek-ai-DeepSeek-V3.2": "2 3 2 3, 2, <｜end▁of▁sentence｜>",
    "deepseek-ai-DeepSeek-V4-Flash-0731": "1 1 1 1, 2, <｜end▁of▁sentence｜>",
    "deepseek-ai-DeepSeek-V4": "1 1 1 1, 2, <｜end▁of▁sentence｜>",
    "fireworks-ai-llama-3-firefunction-v2": "- - - -, 0, <eos>",
    "google-gemma-2-2b-it": "1 - 1 -, 2, <end_of_turn>",
    "google-gemma-4-31B-it-interleaved": "2 3 2 3, 2, <turn|>",
    "google-gemma-4-31B-it": "2 3 2 3, 2, <turn|>",
    "ibm-granite-granite-3.3-2B-Instruct": "1 - 1 -, 2, <|end_of_text|>",
    "ibm-granite-granite-4.0": "1 1 1 1, 2, <|end_of_text|>",
    "ibm-granite-granite-4.1": "1 1 1 1, 2, <|end_of_text|>",
    "inclusionai-ling-3.0-flash": "1 1 1 1, 0, <|role_end|>",
    "llama-cpp-deepseek-r1": "2 - 2 -, 0, <｜end▁of▁sentence｜>",
    "llama-cpp-rwkv-world": "2 - 2 -, 2, <eos>",
    "meetkai-functionary-medium-v3.1": "1 1 1 1, 2, <|eot_id|>",
    "meetkai-functionary-medium-v3.2": "1 1 1 1, 2, <|eot_id|>",
    "meta-llama-Llama-3.1-8B-Instruct": "1 1 1 1, 2, <|eot_id|>",
    "meta-llama-Llama-3.2-3B-Instruct": "1 1 1 1, 2, <|eot_id|>",
    "meta-llama-Llama-3.3-70B-Instruct": "1 1 1 1, 2, <|eot_id|>",
    "microsoft-Phi-3.5-mini-instruct": "2 - 2 -, 2, <|end|>\n<eos>",
    "mistralai-Ministral-3-14B-Reasoning-2512": "1 1 1 1, 0, <eos>",
    "mistralai-Mistral-Nemo-Instruct-2407": "1 - 1 2, 2, <eos>",
    "moonshotai-Kimi-K2": "1 1 1 1, 2, <|im_end|>",
    "muse-glimmer": "1 1 1 1, 0, <|eot|>",
    "openai-gpt-oss-120b": "2 2 2 2, 0, <|return|>",
    "openbmb-MiniCPM5-1B": "1 1 2 2, 0, <|im_end|>",
    "poolside-Laguna-S-2.1": "1 1 1 1, 0, </assistant>",
    "poolside-Laguna-XS-2.1": "1 1 2 3, 2, \n</assistant>",
    "poolside-Laguna-XS.2": "1 1 2 3, 2, \n</assistant>",
    "tencent-Hy3": "1 1 2 3, 2, <｜hy_eos:opensource｜>",
    "unsloth-Apriel-1.5": "1 2 1 2, 2, \n<|end|>\n<eos>",
    "unsloth-mistral-Devstral-Small-2507": "1 1 1 1, 2, <eos>",
    "upstage-Solar-Open-100B": "1 1 2 2, 0, <|end|>",
    "qwen3_5_nothink enable_thinking=true": "2 2 2 2, 0, <|im_end|>",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use enable_thinking=true":
        "1 1 1 1, 2, <|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "Qwen-QwQ-32B enable_thinking=true": "2 3 2 3, 0, <|im_end|>",
    "Reka-Edge enable_thinking=true": "2 3 2 2, 0, \n\n<sep>",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B enable_thinking=true":
        "2 - 2 -, 0, <｜end▁of▁sentence｜>",
    "deepseek-ai-DeepSeek-V3.1 enable_thinking=true": "1 - 2 -, 0, <｜end▁of▁sentence｜>",
    "deepseek-ai-DeepSeek-V3.2 enable_thinking=true": "2 2 2 2, 0, <｜end▁of▁sentence｜>",
    "deepseek-ai-DeepSeek-V4-Flash-0731 enable_thinking=true": "2 1 2 1, 0, <｜end▁of▁sentence｜>",
    "deepseek-ai-DeepSeek-V4 enable_thinking=true": "2 1 2 1, 0, <｜end▁of▁sentence｜>",
    "google-gemma-4-31B-it-interleaved enable_thinking=true": "1 1 1 2, 2, <turn|>",
    "google-gemma-4-31B-it enable_thinking=true": "1 1 1 2, 2, <turn|>",
    "ibm-granite-granite-3.3-2B-Instruct thinking=true": "1 - 1 -, 0, <|end_of_text|>",
    "llama-cpp-rwkv-world enable_thinking=true": "2 - 2 -, 0, <eos>",
    "poolside-Laguna-XS-2.1 enable_thinking=true": "2 3 1 1, 0, \n</assistant>",
    "poolside-Laguna-XS.2 enable_thinking=true": "2 3 1 1, 0, \n</assistant>",
    "tencent-Hy3 reasoning_effort=high": "1 1 2 1, 0, <｜hy_eos:opensource｜>",
    "unsloth-Apriel-1.5 add_thoughts=true": "1 2 1 2, 0, \n<|end|>\n<eos>",
}  # fmt: skip
ALWAYS_OPENS = "CohereForAI-c4ai-command-r7b"  # the next turn, whether a prompt is asked for or not
NEXT_MESSAGE = {  # ends that are written with the next message: of answers, and of calls
    "glm4moe": ("<|user|>", "<|observation|>"),
    "GLM-4.6": ("<|user|>", "<|observation|>"),
    "GLM-4.7-Flash": ("<|user|>", "<|observation|>"),
    "Apertus-8B-Instruct": ("<|assistant_end|>", "<|assistant_end|>"),
    "Apriel-1.6-15b-Thinker-fixed": ("\n<|end|>", "\n<|end|>"),
    "llama-cpp-rwkv-world": ("<eos>", "<eos>"),
    "tencent-Hy3": ("<｜hy_eos:opensource｜>", ""),
}


def encoded(name: str, kind: str) -> tuple[str, list[Example], TrainedRenderings]:
    """The examples of a row, or why the family's template refuses it."""
    try:
        return "", *encode_row(ROWS[kind], tokenizer_of(name))
    except LorafoldError as error:
        return str(error), [], TrainedRenderings(())


def starts(labels: tuple[int, ...]) -> list[int]:
    """Where a run of trained tokens begins."""
    before = (NO_LOSS, *labels)
    return [t for t, label in enumerate(labels) if label != NO_LOSS and before[t] == NO_LOSS]


@pytest.mark.few(12)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", names())
def test_what_is_trained_is_what_generation_sees(name: str, kind: str) -> None:
    row, tokenizer = ROWS[kind], tokenizer_of(name)
    refused, examples, trained = encoded(name, kind)
    if refused:
        assert "\n" not in refused
        assert kind in ("tools", "both", "system") or FAMILIES[name].startswith("-"), refused
        return
    prompts = starting_points(name, row)
    turns: list[int] = []
    for example in examples:
        for start in starts(example.labels):
            before = list(example.ids[:start])
            exact = [i for i, ids in prompts.items() if before == ids]
            if not exact and name in MARKING:
                # a mark may begin later; then it begins within the turn
                within = [i for i, ids in prompts.items() if before[: len(ids)] == ids]
                assert within, tokenizer.decode(before)
                turn = tokenizer.decode(before[len(prompts[within[-1]]) :])
                assert not any(m["role"] + "\n" in turn for m in row["messages"])
                exact = within[-1:] if within[-1] not in turns else []
                assert exact or within[-1] in turns
            elif not exact:
                raise AssertionError(f"generation never starts from {tokenizer.decode(before)!r}")
            turns += exact
    assert sorted(turns) == list(prompts)  # each turn once, and none is lost
    assert trained.left_out == 0


@pytest.mark.few(18)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", [name for name in names() if name not in MARKING])
def test_a_trained_turn_is_what_the_template_adds_for_it(name: str, kind: str) -> None:
    row, tokenizer = ROWS[kind], tokenizer_of(name)
    refused, examples, _ = encoded(name, kind)
    if refused:
        return
    messages, texts = as_taken(name, row["messages"]), set(trained_texts(examples, tokenizer))
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue

        def draw(n: int, **how: Any) -> str:
            found = tokenizer.apply_chat_template(
                messages[:n], tools=row.get("tools"), tokenize=False, **how
            )
            return str(found)

        prompt, after = draw(i, add_generation_prompt=True), draw(i + 1)
        if after.startswith(prompt):
            added = after[len(prompt) :].rstrip()
            if name.startswith(ALWAYS_OPENS):
                added = added.rpartition("<|START_OF_TURN_TOKEN|>")[0]
            in_open_block = prompt.endswith("<think>") and added.startswith("</think>")
            lost = in_open_block and message.get("reasoning_content", "") not in added
            assert lost or added + end_after(name, message) in texts
        else:  # the content is there all the same, once, and after the template's own text
            assert any((message.get("content") or "Rome") in str(text) for text in texts)


def end_after(name: str, message: dict[str, Any]) -> str:
    """What ends a turn and is written with the next message, or not at all."""
    answers, calls = NEXT_MESSAGE.get(name.partition(" ")[0], ("", ""))
    return calls if "tool_calls" in message else answers


@pytest.mark.skipif(not FOLDER.exists(), reason=f"no {FOLDER}: see TEMPLATES in the Makefile")
def test_the_templates_of_llama_cpp_are_in_the_table() -> None:
    assert {path.stem for path in FOLDER.glob("*.jinja")} <= FAMILIES.keys()


@pytest.mark.few(24)
@pytest.mark.parametrize("name", [name for name in names() if name in FAMILIES])
def test_what_a_family_does_with_tools_thinking_and_history(name: str) -> None:
    found, hidden = [], 0
    for kind in ("plain", "tools", "thinking", "both"):
        try:
            shape = format_of(ROWS[kind])
            assert shape is not None
            trained = render_trained(shape.conversation(ROWS[kind]), tokenizer_of(name))
        except LorafoldError:
            found.append("-")
            continue
        found.append(str(len(trained.renderings)))
        hidden = trained.hidden if kind == "thinking" else hidden
    template = template_of(tokenizer_of(name))
    line = f"{' '.join(found)}, {hidden}, {template.ending.text}"
    print(f"{name:20} plain tools thinking both: {line}; {template.block}")
    assert line == FAMILIES[name]


@pytest.mark.few(6)
@pytest.mark.parametrize("name", [name for name in names() if name in KWARGS])
def test_the_variable_that_shows_reasoning_is_named(name: str) -> None:
    tokenizer, kind = tokenizer_of(name), "both" if "gemma" in name or "r7b" in name else "thinking"
    thought = ROWS[kind]["messages"][1]["reasoning_content"]
    report = encode([ROWS[kind]], tokenizer, 4096).report
    assert f"; --template-kwargs {KWARGS[name]} renders the reasoning" in str(report)
    assert not any(thought in text for text in trained_texts(encoded(name, kind)[1], tokenizer))
    _, examples, _ = encoded(f"{name} {KWARGS[name]}", kind)
    assert any(thought in text for text in trained_texts(examples, tokenizer))


@pytest.mark.few(12)
@pytest.mark.parametrize("kind", ["tools", "both"])
@pytest.mark.parametrize("name", names())
def test_every_trained_turn_ends_with_the_end_and_nothing_after_it(name: str, kind: str) -> None:
    _, examples, _ = encoded(name, kind)
    tokenizer = tokenizer_of(name)
    ends = (*template_of(tokenizer).ending.text.split("\n"), *CALLS_END)
    for text in trained_texts(examples, tokenizer):
        assert text.endswith(tuple(filter(None, ends))), text


STABLE = [name for name in names() if name in MARKING]


@pytest.mark.few(14)
@pytest.mark.parametrize("kind", ["plain", "tools", "thinking"])
@pytest.mark.parametrize("name", STABLE)
def test_marks_of_templates_are_as_transformers_has_them(name: str, kind: str) -> None:
    """Where one example holds the whole row, and no mark covers what the template supplies."""
    row, tokenizer = ROWS[kind], tokenizer_of(name)
    refused, examples, _ = encoded(name, kind)
    if refused or len(examples) > 1:
        return
    found: Any = tokenizer.apply_chat_template(
        as_taken(name, row["messages"]), tools=row.get("tools"), return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    assert list(examples[0].ids) == found["input_ids"]
    labels, prompts = examples[0].labels, starting_points(name, row)
    assert prompts
    supplied = {t for ids in prompts.values() for t in range(len(ids)) if labels[t] == NO_LOSS}
    ours = [int(label != NO_LOSS) for label in labels]
    # some marks include the line break after the end token
    ends = {t for t, token in enumerate(found["input_ids"]) if tokenizer.decode(token) == "\n"}
    ends = {t for t in ends if found["input_ids"][t - 1] in tokenizer.added_tokens_decoder}
    supplied |= {t for t in ends if found["assistant_masks"][t : t + 2] in ([1], [1, 0])}
    theirs = [int(m and t not in supplied) for t, m in enumerate(found["assistant_masks"])]
    assert ours == theirs


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("qwen3", "I do not know.<|im_end|>"),
        ("qwen3_5_think", "I do not know.<|im_end|>"),
        ("glm4moe", "I do not know.<|user|>"),
        ("gptoss", "<|channel|>final<|message|>I do not know.<|return|>"),
        ("gemma4_v5", "I do not know.<turn|>"),
        ("deepseek_r1_distill", "I do not know.<｜end▁of▁sentence｜>"),
        ("nemotron_3_nano", "I do not know.<|im_end|>"),
        ("muse_glimmer", " to=user<|message|>I do not know.<|eot|>"),
    ],
)
def test_reasoning_is_masked_with_what_encloses_it(name: str, last: str) -> None:
    tokenizer, row = tokenizer_of(name), ROWS["thinking"]
    masked = encode_row(row, tokenizer, Rendering(mask_reasoning=True))[0]
    texts = trained_texts(masked, tokenizer)
    assert last in texts
    assert not any(thought in text for text in texts for thought in ("A hard one", "Easy"))
    [only] = trained_texts(encode_row(row, tokenizer, Rendering("last"))[0], tokenizer)
    assert "A hard one." in only
    assert only.endswith(last.rpartition("I do not")[2])
    assert "21 degrees" not in only


def test_reasoning_in_contents_is_found_as_well() -> None:
    row = {"messages": [HOW, said("<think>\nEasy.\n</think>\n\n" + ROME)]}
    for name in ("deepseek_r1_distill", "deepseekv3", "qwen3"):
        tokenizer = tokenizer_of(name)
        [example], _ = encode_row(row, tokenizer)
        assert "Easy.\n</think>\n\nIt is 21" in tokenizer.decode(example.ids)
        masked, _ = encode_row(row, tokenizer, Rendering(mask_reasoning=True))
        [text] = trained_texts(masked, tokenizer)
        assert text.startswith("It is 21 degrees.")


def test_a_simple_row_is_rendered_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, count = tokenizer_of("qwen2_5"), 0
    row = {"prompt": "Hi", "completion": "Yo"}
    encode_row(row, tokenizer)  # once a template its form is found out
    real = chat_template.render_jinja_template

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(chat_template, "render_jinja_template", counting)
    encode_row(row, tokenizer)
    assert count == 2


def test_a_report_counts_examples_and_hidden_reasoning() -> None:
    report = encode([ROWS["thinking"]], tokenizer_of("qwen3"), 512).report
    assert (report.rows, report.examples, report.reasoning_hidden) == (1, 2, 0)
    report = encode([ROWS["thinking"]], tokenizer_of("qwen2_5"), 512).report
    assert (report.examples, report.reasoning_hidden) == (1, 2)
    assert "2 assistant turns are trained on without their reasoning" in str(report)
