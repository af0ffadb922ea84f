"""A chat template in Go, as Ollama needs it, writes the same text as the model's own."""

import copy
import json
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError

import families
import lorafold as lf
import template_cases
from conftest import lorafold, make_tokenizer
from gguf_models import saved
from lorafold.errors import LorafoldError
from lorafold.exporting.to_ollama import convert_template, modelfile

GO = shutil.which("go")
PROGRAM = Path(__file__).with_name("go") / "render.go"
SAID = ["Hello there.", "Line one.\nLine two: {{ x }} \"q\" 'r'", "Grüße, 世界 🚀 & <b>", "Why?"]
CHATS = ["u", "su", "uau", "suau", "uauau", "suauau", "suauauau"]
ROLES = {"s": "system", "u": "user", "a": "assistant"}

# after those of families, in the forms that they have in the field
FIELD = {
    "smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "mistral-v1": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{% set given = messages[0]['content'] %}{% set rest = messages[1:] %}"
        "{% else %}{% set given = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
        "{% if loop.first and given %}{{ given + '\n\n' }}{% endif %}"
        "{{ m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "mistral-v3": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{% set given = messages[0]['content'] %}{% set rest = messages[1:] %}"
        "{% else %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if m['role'] == 'user' %}{% if loop.last and given is defined %}"
        "{{ '[INST] ' + given + '\n\n' + m['content'] + '[/INST]' }}"
        "{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set given = messages[0]['content'] %}{% else %}{% set rest = messages %}"
        "{% set given = false %}{% endif %}{% for m in rest %}"
        "{% if loop.index0 == 0 and given != false %}"
        "{% set text = '<<SYS>>\n' + given + '\n<</SYS>>\n\n' + m['content'] %}"
        "{% else %}{% set text = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + text + ' [/INST]' }}{% else %}"
        "{{ ' ' + text + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
}  # fmt: skip
IN_TRL = ("llama3", "llama3_2", "qwen2_5", "qwen3", "gemma", "gemma3", "phi3", "glm4moe", "gptoss")
ALL = [*FIELD, *IN_TRL, *template_cases.CASES]
NUMBERED = "{% for m in messages %}[{{ loop.index }}] {{ m.content }}{% endfor %}<|im_end|>"


def tokenizer_of(name: str):
    if name in FIELD:
        made = copy.deepcopy(families.embedded())
        made.chat_template = FIELD[name]
        return made
    if name in template_cases.CASES:
        return template_cases.tokenizer_of(template_cases.CASES[name])
    return families.tokenizer_of(name)


def chats() -> list[list[dict[str, str]]]:
    return [
        [{"role": ROLES[r], "content": SAID[(n + shift) % len(SAID)]} for n, r in enumerate(roles)]
        for roles, shift in product(CHATS, range(len(SAID)))
    ]


@pytest.fixture(scope="module")
def in_go(tmp_path_factory):
    """What Go writes of a template for chats, a text each."""
    program = tmp_path_factory.mktemp("go") / "render"
    subprocess.run(["go", "build", "-o", str(program), str(PROGRAM)], check=True)

    def texts(template: str, given: list[list[dict[str, str]]]) -> list[str]:
        asked = [[{k.title(): v for k, v in message.items()} for message in chat] for chat in given]
        done = subprocess.run(
            [str(program)], input=json.dumps({"Template": template, "Chats": asked}),
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return json.loads(done.stdout)

    return texts


@pytest.mark.slow
@pytest.mark.skipif(GO is None, reason="go is not installed (apt-get install golang-go)")
@pytest.mark.parametrize("name", ALL)
def test_go_writes_what_the_model_s_template_does(name, in_go):
    tokenizer = tokenizer_of(name)
    template, stops, notes = convert_template(tokenizer)
    given, wanted = [], []
    for chat in chats():
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except TemplateError:
            assert chat[0]["role"] == "system"
            assert any("no system message" in note for note in notes)
            continue
        given.append(chat)
        wanted.append(text)
    assert len(given) >= 3 * len(SAID)
    assert in_go(template, given) == wanted
    assert tokenizer.eos_token in stops


def test_a_template_that_no_marks_say_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = NUMBERED
    with pytest.raises(LorafoldError, match=r"can't be converted for Ollama.*--to gguf-mod"):
        convert_template(tokenizer)


def test_tools_and_reasoning_are_said_to_be_left_out():
    notes = convert_template(families.tokenizer_of("qwen3"))[2]
    assert any("also supports tools and reasoning" in note for note in notes)
    assert not convert_template(tokenizer_of("smollm2"))[2]


def test_what_a_modelfile_cannot_have_is_refused():
    with pytest.raises(LorafoldError, match='has """, which a Modelfile'):
        modelfile("model.gguf", 'say """hi"""', [])
    with pytest.raises(LorafoldError, match="u200b"):
        modelfile("model.gguf", "a\u200bb", [])


def test_the_directory_has_what_ollama_needs(tmp_path):
    base = saved("llama", tmp_path / "base")
    asked = ("--to", "ollama", "--tensors", "Q8_0", "--no-proof", "--out", str(tmp_path / "out"))
    done = lorafold("export", "--model", str(base), *asked, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith("FROM ./model-Q8_0.gguf\nTEMPLATE")
    assert 'PARAMETER stop """<|im_end|>"""' in text
    assert f"ollama create base -f {tmp_path / 'out'}/Modelfile" in done.stdout + done.stderr
    assert (tmp_path / "out" / "model-Q8_0.gguf").is_file()
    with pytest.raises(LorafoldError, match="exists"):
        lf.export(base, out=tmp_path / "out", to="ollama", prove=False, device="cpu")
