"""Exported adapters compute the same in other engines, or the export is refused."""

import ast
import csv
import json
import shlex
import shutil
from itertools import chain
from pathlib import Path

import gguf
import pytest
import torch

import lorafold as lf
from adapter_files import configure, json_of
from classify_cases import ROWS
from conftest import make_tokenizer, refused
from conversation_cases import jsonl
from export_cases import noisy, proof_of
from gguf_models import saved
from lorafold.errors import LorafoldError
from lorafold.exporting.proof import Answers, EngineAnswers, Proof, compare
from lorafold.exporting.run import _check_proof, target_of
from lorafold.exporting.target import update_of
from lorafold.exporting.to_mlx import legacy_config
from lorafold.methods import METHODS

EXACT = ("lora", "rslora", "pissa", "olora", "vera", "adalora")
OTHERS = ("dora", "loha", "lokr", "ia3")


@pytest.fixture
def adapter(tiny_model, tmp_path):
    """The directory of an adapter of a method on the tiny Llama, whose update is not small."""

    def saved(method: str, **beside) -> Path:
        return noisy(tiny_model("llama"), METHODS[method](), tmp_path / "adapter", **beside)

    return saved


@pytest.mark.parametrize("method", EXACT)
def test_factors_are_the_update(method, adapter, tiny_model):
    """Of every method that is a product, bases moved by PiSSA and OLoRA included."""
    saved, model, merged = adapter(method), tiny_model("llama"), tiny_model("llama")
    lf.load(model, saved, "one")
    update = update_of(model, ["one"])
    assert not update.dense
    assert not update.other
    assert len(update.factors) == 14
    before = {path: merged.get_submodule(path).weight.clone() for path in update.factors}
    lf.load(merged, saved, "one").merge()
    for path, (up, down) in update.factors.items():
        change = merged.get_submodule(path).weight - before[path]
        torch.testing.assert_close(change, up @ down, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", OTHERS)
def test_others_are_cut_to_the_best_of_a_rank(method, adapter, tiny_model):
    model = tiny_model("llama")
    lf.load(model, adapter(method), "one")
    whole = update_of(model, ["one"], rank=32)
    assert whole.error < 1e-5
    cut = update_of(model, ["one"], rank=4)
    for path, (up, down) in whole.factors.items():
        s = torch.linalg.svdvals(up @ down)
        lost, _ = cut.lost[path]
        assert lost == pytest.approx(float(s[4:].square().sum()), rel=1e-3, abs=1e-9)
        assert down.shape[0] <= 32
        assert cut.factors[path][1].shape[0] <= 4
    assert update_of(model, ["one"]).dense.keys() == whole.factors.keys()


@pytest.fixture
def prompts(tmp_path):
    """A file of few prompts: PEFT takes a second for each."""
    rows = [{"prompt": text} for text in ("the fox", "What is rain?", "jumps", "over the dog")]
    return Path(jsonl(tmp_path / "prompts.jsonl", *rows))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rslora", "pissa"])
def test_peft_computes_what_lorafold_does(method, adapter, prompts, tiny_model_dir, tmp_path):
    out, base = tmp_path / "out", tiny_model_dir("llama")
    done = lf.export(base, adapter(method), out, to="peft", prompts=prompts, device="cpu")
    proof = proof_of(done, 1e-6)
    assert proof.kl < 1e-9
    assert proof.top == proof.prompts == 4
    assert proof.greedy + proof.near == 4
    assert not proof.unused
    assert proof.changed == pytest.approx(proof.distance, rel=1e-3)
    assert json_of(out, "export.json")["proof"]["engine"] == "PEFT"
    config = json_of(out / "adapter")
    assert not any(config[name] for name in ("rank_pattern", "alpha_pattern", "use_rslora"))
    assert config["lora_alpha"] == config["r"]


def test_as_lora_says_what_it_loses_and_which_rank_is_enough(
    adapter, prompts, tiny_model_dir, tmp_path
):
    base, saved = tiny_model_dir("llama"), adapter("dora")
    few = {"prompts": prompts, "device": "cpu"}
    with pytest.raises(LorafoldError, match=r"DoRA is not a product .* --as-lora \d+ writes"):
        lf.export(base, saved, tmp_path / "none", to="gguf", **few)
    assert not (tmp_path / "none").exists()
    done = lf.export(base, saved, tmp_path / "out", to="gguf", as_lora=2, **few)
    proof_of(done, 1e-3)
    assert done.cut.share > 1e-3
    assert done.cut.enough > 2


def test_what_a_target_cannot_say_is_refused(adapter, tiny_model_dir, tmp_path):
    saved = adapter("lora", modules_to_save=["norm"])
    asked = ("--to", "peft", "--out", str(tmp_path / "out"), "--device", "cpu")
    told = refused("export", str(saved), "--model", str(tiny_model_dir("llama")), *asked)
    assert "norm" in told
    assert "can't represent" in told
    assert not (tmp_path / "out").exists()


def proved(**figures):
    """The figures of a proof, all well but those given."""
    plain = {
        "engine": "mlx-lm", "version": "1", "prompts": 32, "kl": 1e-9, "kl_largest": 1e-8,
        "distance": 0.1, "changed": 0.1, "alone": 1e-9, "tied": 0, "measured": 1e-9, "top": 32,
        "gap": 1e-4, "greedy": 32, "near": 0, "unused": (), "other_tokens": (), "other_texts": (),
    }  # fmt: skip
    return Proof(**(plain | figures))


def test_an_engine_that_reads_another_base_is_no_rounding():
    """As far from lorafold without the adapter as with it, and far: mlx-lm with GLM."""
    with pytest.raises(LorafoldError, match="computes the base differently"):
        _check_proof(proved(kl=0.69, alone=0.63), target_of("mlx"), None)
    _check_proof(proved(kl=6e-4, alone=5e-4, distance=1e-3), target_of("mlx"), None)


def test_a_base_that_an_adapter_of_peft_names_otherwise_is_told(
    tiny_model, tiny_model_dir, tmp_path
):
    saved, base = noisy(tiny_model("llama"), lf.LoRA(rank=2), tmp_path / "a"), tmp_path / "base"
    shutil.copytree(tiny_model_dir("llama"), base)
    (saved / "lorafold.json").unlink()

    def told(name: str) -> str:
        configure(saved, base_model_name_or_path=name)
        asked = {"to": "peft", "prove": False, "overwrite": True, "device": "cpu"}
        return lf.export(base, saved, tmp_path / "out", **asked).summary()

    assert "adapter_config.json is org/other, but this base is" in told("org/other")
    assert "but this base is" not in told("org/base")


def test_part_of_a_head_that_is_rotated_is_told_in_the_older_word():
    """Phi's, StableLM's and GLM-4's, which mlx-lm reads beside rope_theta or has a default for."""
    config = {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}
    older = legacy_config(config) or {}
    assert older["partial_rotary_factor"] == 0.25


@pytest.fixture
def exported(tiny_model, tiny_model_dir, tmp_path):
    """What exporting an adapter of a tiny Qwen 2 says, and its directory."""

    def made(spec, to, name="adapter", tokenizer=None, attach=None, std=0.3, **how):
        saved = noisy(tiny_model("qwen2"), spec, tmp_path / name, std, **(attach or {}))
        if tokenizer is not None:
            tokenizer.save_pretrained(saved)
        how = {"prove": False, "device": "cpu"} | how
        return lf.export(tiny_model_dir("qwen2"), saved, tmp_path / "out", to=to, **how)

    return made


def other_template():
    """A tokenizer with another chat template than the tiny model's."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return tokenizer


def test_a_cut_keeps_the_name_and_the_tokenizer(exported, tmp_path):
    """It was named scratch, and had the base's chat template."""
    done = exported(lf.DoRA(), "ollama", "facts", other_template(), as_lora=4)
    assert done.launch[0].startswith("ollama create facts -f ")
    assert "[assistant]" in (tmp_path / "out" / "Modelfile").read_text()


@pytest.mark.parametrize(
    ("spec", "attach", "said"),
    [
        (lf.LoRA(), {"modules_to_save": ["norm"]}, "norm: a vector, which LoRA can't represent"),
        (lf.BitFit(), {}, "a bias, which LoRA can't represent"),
        (lf.LoRA(), {"tokens": [5, 6]}, "rows of tokens, which LoRA can't represent"),
    ],
)
def test_a_cut_drops_nothing(spec, attach, said, exported, tmp_path):
    """Biases were left out, and 0.00% of the update was said to be lost."""
    with pytest.raises(LorafoldError, match=said):
        exported(spec, "gguf", attach=attach, as_lora=8)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [0, True, "3", 2.5])
def test_a_rank_is_a_whole_number(rank, exported):
    with pytest.raises(LorafoldError, match=r"as_lora: found .*, expected"):
        exported(lf.LoRA(), "gguf", as_lora=rank)


def test_ollama_gets_a_name_that_it_takes(exported):
    done = exported(lf.LoRA(), "ollama", "für Grüße")
    assert done.launch[0].startswith("ollama create f-r-gr--e -f ")


@pytest.mark.parametrize(
    "to", ["gguf", "llama.cpp", "ollama", "gguf-model", "vllm", "sglang", "mlx"]
)
def test_lines_are_what_a_shell_takes(to, tiny_model, tiny_model_dir, tmp_path):
    """Whatever paths have: spaces, quotation marks, umlauts; and = in a name."""
    odd = tmp_path / 'it\'s $HOME "für" mich'
    base, out = odd / "a base", odd / "an out"
    shutil.copytree(tiny_model_dir("qwen2"), base)
    saved = noisy(tiny_model("qwen2"), lf.LoRA(), odd / "lr=1e-4, x")
    done = lf.export(base, saved, out, to=to, prove=False, device="cpu")
    commands = [shlex.split(line, comments=True) for line in done.launch if '"lora": [' not in line]
    words = [word for command in commands for word in command]
    if to in ("vllm", "sglang"):
        given = next(json.loads(word) for word in words if word.startswith("{"))
        assert set(given.values()) == {"lr=1e-4, x", str(out / "adapter")}
    elif to in ("gguf", "llama.cpp"):
        assert [str(out / "adapter.gguf")] == listed_in(words[words.index("--lora") + 1])
    else:
        assert any(word.startswith(f"{out}/") for word in words)
    if to in ("gguf", "llama.cpp", "vllm", "sglang"):
        assert str(base) in words


def listed_in(value):
    """The paths of llama.cpp's --lora, a row of CSV."""
    return next(csv.reader([value]))


@pytest.mark.parametrize("name", ["a,b", "a:1.0", "a=b", "a, b=c"])
def test_a_directory_that_an_engine_would_split(name, tiny_model, tiny_model_dir, tmp_path):
    """llama.cpp's --lora-scaled ends a path at a comma or a colon, vLLM takes a comma for JSON."""
    out = tmp_path / name
    saved = noisy(tiny_model("qwen2"), lf.LoRA(), tmp_path / "facts")
    for to in ("gguf", "llama.cpp", "vllm"):
        done = lf.export(
            tiny_model_dir("qwen2"), saved, out, to=to, prove=False, device="cpu", overwrite=True
        )
        words = [*chain(*(shlex.split(line, comments=True) for line in done.launch))]
        if to != "vllm":
            assert listed_in(words[words.index("--lora") + 1]) == [str(out / "adapter.gguf")]
            continue
        value = words[words.index("--lora-modules") + 1]
        if "=" in value and "," not in value:  # vLLM's LoRAParserAction
            found = value.split("=", 1)
        else:
            found = [*json.loads(value).values()]
        assert found == ["facts", str(out / "adapter")]


def test_lines_of_python_are_python(tiny_model, tiny_model_dir, tmp_path):
    out = tmp_path / 'a "quoted" \\ name'
    saved = noisy(tiny_model("qwen2"), lf.LoRA(), tmp_path / "adapter")
    done = lf.export(tiny_model_dir("qwen2"), saved, out, to="peft", prove=False, device="cpu")
    nodes = ast.walk(ast.parse("\n".join(done.launch)))
    assert str(out / "adapter") in [n.value for n in nodes if isinstance(n, ast.Constant)]


def test_llama_cpp_is_told_of_another_template(exported, tmp_path):
    """Its server has the base's, which the adapter was not trained with; nothing said so."""
    done = exported(lf.LoRA(), "llama.cpp", tokenizer=other_template())
    words = shlex.split(done.launch[1])
    file = Path(words[words.index("--chat-template-file") + 1])
    assert "[assistant]" in file.read_text()
    assert "differs from the base model's" in done.summary()


@pytest.mark.parametrize("row", [{"text": "the fox"}, {"text": "the fox", "label": "x"}])
def test_rows_that_ask_nothing_are_no_prompts(row, exported, tmp_path):
    """Plain text ended in a KeyError."""
    (file := tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(LorafoldError, match="found rows of plain text, expected rows with prompts"):
        exported(lf.LoRA(), "gguf", prove=True, prompts=file)


def test_no_number_is_no_proof():
    """From NaN nothing has a distance, so it was as near as can be."""
    ours = Answers(torch.zeros(2, 30), torch.zeros(2, 30), ((), ()))
    theirs = EngineAnswers(torch.full((2, 30), torch.nan), None, ((), ()), "llama.cpp", "1")
    with pytest.raises(LorafoldError, match="contain NaN"):
        compare(ours, theirs, lambda prompt, at: 1.0)


def test_one_prompt_and_an_adapter_that_changes_nothing_are_told(exported, tmp_path):
    pytest.importorskip("xllamacpp")
    (file := tmp_path / "rows.jsonl").write_text('{"prompt": "the fox"}\n')
    said = exported(lf.LoRA(), "gguf", std=0.0, prove=True, prompts=file).summary()
    assert ", 1 prompt: KL " in said
    assert "the adapters: no effect on these prompts" in said


def test_llama_cpp_says_why_it_refuses_a_prompt(exported, tmp_path):
    """A prompt that is longer than the model's positions was a Bad Request."""
    pytest.importorskip("xllamacpp")
    (file := tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "the fox " * 900}) + "\n")
    with pytest.raises(LorafoldError, match=r"llama\.cpp: .*context"):
        exported(lf.LoRA(), "gguf", prove=True, prompts=file)


def test_a_base_without_a_tokenizer_is_told(tiny_model, tiny_model_dir, tmp_path):
    """It was that alone, without what to do, and without a proof nothing was said."""
    base, out = tmp_path / "wordless", tmp_path / "out"
    words = shutil.ignore_patterns("*token*", "chat_template*")
    shutil.copytree(tiny_model_dir("qwen2"), base, ignore=words)
    saved = noisy(tiny_model("qwen2"), lf.LoRA(), tmp_path / "adapter")
    with pytest.raises(LorafoldError, match=r"add its files next to .*, or use --no-proof"):
        lf.export(base, saved, out, to="peft", device="cpu")
    assert not out.exists()
    done = lf.export(base, saved, out, to="peft", prove=False, device="cpu")
    assert "the base: no tokenizer, which engines need for text prompts" in done.summary()


@pytest.mark.parametrize("program", ["/bin/true", "/bin/false", "/bin/echo"])
def test_a_program_that_is_no_python_is_told(program, exported, tmp_path):
    """What ended without answers was told by its exit code, and by whatever it had printed."""
    with pytest.raises(LorafoldError, match=rf"-python {program}: .* environment with peft"):
        exported(lf.LoRA(), "peft", prove=True, engine_python=program)
    assert not (tmp_path / "out").exists()


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("to", "url", "beside", "said"),
    [
        ("mlx", "http://localhost:9", {}, "for mlx, but only --to vllm"),
        ("vllm", "http://localhost:9", {"engine_python": "python"}, "can't be combined"),
        ("vllm", "http://localhost:9", {}, "refused; expected the URL of vLLM's server"),
        ("vllm", "localhost", {}, "unknown url type: .*; expected the URL of vLLM's server"),
    ],
)
def test_a_url_that_is_no_server_is_told(to, url, beside, said, exported, tmp_path):
    with pytest.raises(LorafoldError, match=said):
        exported(lf.LoRA(), to, prove=True, engine_url=url, **beside)
    assert not (tmp_path / "out").exists()


def test_what_is_called_phi_3_and_is_none_has_another_name(tmp_path):
    """llama.cpp said _Map_base::at of it too: it looks up tokens of what is called so."""
    base = saved("llama", tmp_path / "My-Phi3-tiny")
    lf.export(base, out=tmp_path / "out", to="gguf-model", prove=False, device="cpu")
    field = gguf.GGUFReader(tmp_path / "out" / "model-F16.gguf").fields["general.name"]
    assert field.contents() == "My-Phi 3-tiny"


def test_a_vocabulary_without_some_bytes_is_refused(tmp_path):
    """llama.cpp said _Map_base::at of it."""
    base = saved("phi3", tmp_path / "base")
    file = base / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["zz"] = vocabulary.pop("<0x0A>")
    file.write_text(json.dumps(content))
    with pytest.raises(LorafoldError, match=r"no token for <0x0A>, but .* requires one for"):
        lf.export(base, out=tmp_path / "out", to="gguf-model", device="cpu")


def test_what_a_classifier_is_for_is_said(tiny_model_dir, tmp_path):
    base = tiny_model_dir("qwen2")
    recipe = lf.Recipe(objective="classify", steps=1, batch=9, storage="fp32")
    lf.train(recipe, model=base, data=ROWS, out=tmp_path / "classes", device="cpu")
    with pytest.raises(LorafoldError, match=r"a classifier of .* load the adapter with PEFT") as e:
        lf.export(base, tmp_path / "classes", tmp_path / "out", to="peft", device="cpu")
    assert len(str(e.value)) - len(str(tmp_path)) < 250
