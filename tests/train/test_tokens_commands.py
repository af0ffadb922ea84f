"""New tokens from the command line: trained, saved, read by PEFT, merged and generated."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorafold as lf
from adapter_cases import relative, resaved
from fresh_models import fresh_model
from lorafold.api.merge import merge
from lorafold.comparing.measure import ComparisonTask, Variant
from lorafold.comparing.run import compare
from lorafold.errors import LorafoldError
from lorafold.evaluation import EvaluationSettings, evaluate
from lorafold.files.atomic import MANIFEST
from lorafold.generation import complete, end_tokens
from lorafold.merging.plan import with_vocabulary_size
from lorafold.methods.common.trainable_tokens import TrainableTokens
from lorafold.models.loading import load_model
from lorafold.models.sources import resolve_model
from lorafold.models.tokenizer import add_tokens, load_tokenizer, set_template, tokenizer_of
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.recipe.recipe import Recipe
from lorafold.resolve import Base
from lorafold.training.inputs import RunRequest
from lorafold.training.preview import show
from lorafold.training.run import train
from noise import moved
from process_cases import same_bytes
from token_cases import ROWS, lorafold, quiet, request, said, trained
from training_cases import stopping
from typed_commands import done, result, write_rows

pytestmark = pytest.mark.usefixtures("unestimated")

ROLES = "<|user|>,<|assistant|>"
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant'"
    " %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{%"
    " endif %}"
)
ROWS_KEY = "token_adapter.trainable_tokens_delta"


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jinja"
    path.write_text(TEMPLATE)
    return path


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> torch.Tensor:
    return model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def config_of(adapter: Path) -> dict[str, Any]:
    return json.loads((adapter / "adapter_config.json").read_text())


def in_peft(model: Any, words: int, adapter: Path, ids: list[int]) -> torch.Tensor:
    """The logits in PEFT, on a base that its user resized."""
    model.resize_token_embeddings(words)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(peft.PeftModel.from_pretrained(model, adapter), ids)


@pytest.mark.slow
@pytest.mark.estimated
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_format_of_ones_own_up_to_a_plain_model(kind, template, tiny_model_dir, tmp_path) -> None:
    base, data = tiny_model_dir(kind), write_rows(tmp_path / "rows.jsonl", ROWS)
    out, merged = tmp_path / "a", tmp_path / "m"
    sets = "--set steps=40 --set batch=4 --set lr=1e-2 --set lr_b=2e-2 --set dropout=0"
    asked = f"train --model {base} --data {data} --out {out} --new-tokens {ROLES} {sets}"
    told = done(f"{asked} --chat-template {template} --storage fp32 --json")
    assert "new tokens: <|user|> 300, <|assistant|> 301" in told.stderr
    losses = json.loads(told.stdout.splitlines()[-1])["losses"]

    # the adapter: rows for two tokens, and the tokenizer that writes them, with its template
    tensors = load_file(out / "adapter_model.safetensors")
    rows = [t for key, t in tensors.items() if key.endswith("trainable_tokens_delta")]
    assert [tuple(t.shape) for t in rows] == [(2, 32)] * (1 if kind == "gpt2" else 2)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == TEMPLATE
    conversation = tokenizer.apply_chat_template(ROWS[7]["messages"], tokenize=False)
    ids = tokenizer(conversation, add_special_tokens=False).input_ids
    assert (ids[0], ids.count(300), ids.count(301)) == (300, 1, 1)
    model, start = fresh_model(base), fresh_model(base)
    adapter = lf.load(model, out)
    expected = logits(model, ids)
    assert len(expected[0]) == 302
    torch.manual_seed(0)
    untrained = lf.attach(start, lf.LoRA(), tokens=(300, 301)).deltas[next(iter(adapter.tokens))]
    assert (rows[-1] - untrained.rows).abs().amax(1).min() > 1e-2  # both rows learned
    assert relative(in_peft(fresh_model(base), len(tokenizer), out, ids), expected) < 1e-5

    # a plain model, with the adapter's tokenizer
    found = result(f"merge --model {base} --adapter {out} --out {merged}")
    assert (found["vocabulary"], found["untied"]) == (302, [])
    assert found["kl"] < 1e-9
    plain, info = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not any(info.values())
    assert plain.config.vocab_size == len(AutoTokenizer.from_pretrained(merged)) == 302
    embedding, head = plain.get_input_embeddings(), plain.get_output_embeddings()
    assert (embedding.weight is head.weight) == (kind == "gpt2")
    assert relative(logits(plain, ids), expected) < 1e-5
    assert AutoTokenizer.from_pretrained(merged).get_vocab() == tokenizer.get_vocab()
    assert (merged / "chat_template.jinja").read_text() == TEMPLATE

    # both say the same, and about as well as training ended
    spoken, measured = [], []
    for of in (f"--model {base} --adapter {out}", f"--model {merged}"):
        said = lorafold(*f"generate {of} --max-new-tokens 12 --storage fp32 --json".split(),
                        "--prompt", "Book a table for 7")  # fmt: skip
        spoken.append(json.loads(said.stdout)["text"])
        found = result(f"eval {of} --data {data} --storage fp32 --no-completions")
        measured.append(found["loss"])
    assert spoken[0] == spoken[1]
    assert measured[0] == pytest.approx(measured[1], rel=1e-5)
    assert measured[0] < losses[0] - 0.3


def test_what_is_known_already_is_said_and_trained(tiny_model_dir, template, tmp_path) -> None:
    asked = request(
        tiny_model_dir("gemma"),
        tmp_path / "a",
        new_tokens=("<|user|>", "<|im_end|>"),
        chat_template=str(template),
    )
    notice = (
        "new tokens: <|user|> 300; <|im_end|> is already a token (2), and its embedding is trained"
        " too"
    )
    shown = said(show, asked)
    assert notice in shown
    assert "<|user|>Book a table for 0" in shown
    assert '⟦{"people": 0}<|im_end|>⟧' in shown
    assert notice in said(train, asked)
    assert config_of(tmp_path / "a")["trainable_token_indices"] == [300, 2]
    record = json.loads((tmp_path / "a" / "lorafold.json").read_text())
    assert record["new_tokens"] == {"<|user|>": 300, "<|im_end|>": 2}
    assert record["recipe"]["chat_template"] == str(template)


def test_a_template_alone_travels_with_the_adapter(tiny_model_dir, template, tmp_path) -> None:
    trained(tiny_model_dir("llama"), tmp_path / "a", new_tokens=(), chat_template=str(template))
    source = resolve_model(tiny_model_dir("llama"))
    assert tokenizer_of(source, [tmp_path / "a"]).chat_template == TEMPLATE
    trained(tiny_model_dir("llama"), tmp_path / "b", new_tokens=())
    assert not (tmp_path / "b" / "tokenizer.json").exists()
    found = Base(tiny_model_dir("llama")).tokenizer([SavedAdapter.open(tmp_path / "b")])
    assert found.chat_template == load_tokenizer(source).chat_template


@pytest.mark.slow
def test_resuming_gives_the_bytes_of_a_run_that_never_stopped(
    tiny_model_dir, template: Path, tmp_path: Path, monkeypatch
) -> None:
    def asked(name: str, **more: Any) -> RunRequest:
        fields = {"steps": 12, "save_every": 4, "chat_template": str(template)}
        return request(tiny_model_dir("gpt2"), tmp_path / name, **fields, **more)

    train(asked("straight"), quiet())
    with stopping(6), pytest.raises(KeyboardInterrupt):
        train(asked("stopped"), quiet())
    template.write_text(TEMPLATE + "\n")
    told = "resume, because settings have changed: {}: was"
    with pytest.raises(LorafoldError, match=told.format("chat_template")):
        train(asked("stopped", resume=True), quiet())
    template.write_text(TEMPLATE)
    with pytest.raises(LorafoldError, match=told.format("new_tokens")):
        train(asked("stopped", resume=True, new_tokens=("<|user|>",)), quiet())
    train(asked("stopped", resume=True), quiet())
    assert same_bytes(tmp_path / "stopped", tmp_path / "straight")


@pytest.mark.slow
def test_an_adapter_to_start_from_brings_its_tokens(tiny_model_dir, template, tmp_path) -> None:
    base = tiny_model_dir("gemma")
    first = trained(
        base, tmp_path / "a", chat_template=str(template), steps=40, lr=1e-2, dropout=0.0
    )
    second = trained(base, tmp_path / "b", init_adapter=tmp_path / "a", new_tokens=None, lr=1e-3)
    assert second.losses[0] < first.losses[0] - 0.1
    a, b = ((tmp_path / name / "tokenizer.json").read_text() for name in "ab")
    assert a == b
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == TEMPLATE
    keys = [set(load_file(tmp_path / name / "adapter_model.safetensors")) for name in "ab"]
    assert keys[0] == keys[1]
    told = "new_tokens: the adapter of --init-adapter fixes these fields"
    with pytest.raises(LorafoldError, match=told):
        trained(base, tmp_path / "c", init_adapter=tmp_path / "a")


def test_rows_past_the_tokenizers_end_start_afresh(tiny_model_dir, tmp_path: Path) -> None:
    """The matrix has a row for the first new word, and none for the second."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir("llama"), base)
    model = fresh_model(base)
    model.resize_token_embeddings(301)
    with torch.no_grad():
        model.get_input_embeddings().weight[300] = 9.0
    model.save_pretrained(base)
    trained(base, tmp_path / "a", steps=1, lr=1e-6)
    rows = load_file(tmp_path / "a" / "adapter_model.safetensors")[
        f"base_model.model.model.embed_tokens.{ROWS_KEY}"
    ]
    mean = model.get_input_embeddings().weight.mean(0)
    assert torch.allclose(rows, mean.expand(2, -1), atol=1e-5)
    merged = merge(str(base), [tmp_path / "a"], tmp_path / "m", certificate=False)
    assert merged.folded.vocabulary == 302


def test_a_word_without_a_row_is_named(tiny_model_dir, tmp_path: Path) -> None:
    """The tokenizer knows more words than the matrix has rows."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir("llama"), base)
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["<|extra|>"], special_tokens=True)
    tokenizer.save_pretrained(base)
    told = r"tokens \[301, 302\] leave a gap: the base's last token is 299; .* from 300 on"
    with pytest.raises(LorafoldError, match=told):
        trained(base, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    trained(base, tmp_path / "a", new_tokens=("<|extra|>", "<|user|>"))


def test_templates_that_cannot_be_used_are_one_line(tiny_model_dir, tmp_path: Path) -> None:
    for name, content, message in [
        ("none", None, "can't be read: No such file or directory"),
        ("broken", b"{% for m in messages %}\n{{ m.content }", "line 2: unexpected '}'"),
        ("bytes", b"\xff\xfe", "can't be read: it is not UTF-8 text"),
        ("empty", b" \n", "found an empty file"),
    ]:
        path = tmp_path / f"{name}.jinja"
        if content is not None:
            path.write_bytes(content)
        asked = request(tiny_model_dir("llama"), tmp_path / "a", chat_template=str(path))
        told = f"chat template .*{name}.jinja: {message}"
        with pytest.raises(LorafoldError, match=told) as caught:
            show(asked, quiet())
        assert "\n" not in str(caught.value)
    # one that refuses some conversations is a template all the same
    (tmp_path / "strict.jinja").write_text("{{ raise_exception('only systems') }}")
    set_template(load_tokenizer(tiny_model_dir("llama")), tmp_path / "strict.jinja")


def test_words_that_make_no_token_are_one_line(tiny_model_dir, tmp_path: Path) -> None:
    cases = {
        ("a", " "): "new_tokens: found ' ', expected distinct words",
        ("<|u|>", "<|u|>"): "found '<|u|>', expected distinct words that are not blank",
    }
    for words, message in cases.items():
        with pytest.raises(LorafoldError, match=message.replace("|", r"\|")):
            show(request(tiny_model_dir("llama"), tmp_path / "a", new_tokens=words), quiet())


def saved(base: Path, path: Path, words: list[str]) -> Path:
    tokenizer, model = load_tokenizer(base), fresh_model(base)
    ids = add_tokens(tokenizer, words).ids.values()
    adapter = moved(lf.attach(model, lf.LoRA(rank=2), tokens=tuple(ids)), seed=len(words))
    return adapter.save(path, tokenizer=tokenizer)


def test_the_last_adapters_tokenizer_counts_and_they_must_agree(tiny_model_dir, tmp_path) -> None:
    base = tiny_model_dir("llama")
    source = resolve_model(base)
    one, two, other = (
        saved(base, tmp_path / str(i), words)
        for i, words in enumerate((["<|a|>"], ["<|a|>", "<|b|>"], ["<|b|>", "<|a|>"]))
    )
    for order in ([one, two], [two, one]):
        tokenizer = tokenizer_of(source, order)
        assert tokenizer("<|b|><|a|>").input_ids == [301, 300]
        assert tokenizer.decode([301, 5], skip_special_tokens=True) == tokenizer.decode([5])
    told = r"0 and .*2: their tokenizers differ: token 300 is <\|a\|> and <\|b\|>; these"
    with pytest.raises(LorafoldError, match=told):
        tokenizer_of(source, [one, other])
    merged = merge(str(base), [one, two], tmp_path / "m", device="cpu")
    assert merged.folded.vocabulary == 302
    assert merged.gap is not None
    assert merged.gap.relative_logit_gap < 1e-5
    with pytest.raises(LorafoldError, match="their tokenizers differ"):
        merge(str(base), [two, other], tmp_path / "n")


def test_a_new_token_that_closes_turns_ends_answers(tiny_model_dir, tmp_path: Path) -> None:
    model, tokenizer = (
        fresh_model(tiny_model_dir("llama")),
        load_tokenizer(tiny_model_dir("llama")),
    )
    end = add_tokens(tokenizer, ["<|end|>"]).ids["<|end|>"]
    assert end_tokens(model, tokenizer) == {2}
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>\n{% endfor %}"
    )
    set_template(tokenizer, tmp_path / "chat.jinja")
    assert end_tokens(model, tokenizer) == {2, end}
    adapter = lf.attach(model, lf.LoRA(rank=2), tokens=(end,))
    with torch.no_grad():
        adapter.deltas["lm_head"].rows.copy_(
            100 * model.model(torch.tensor([[5]])).last_hidden_state[0, -1:]
        )
    assert complete(model, tokenizer, [tokenizer.decode([5])], 8) == [""]


def test_a_classifier_learns_new_words(tiny_model_dir, tmp_path: Path) -> None:
    rows = [
        {"text": f"<|{label}|> {n}", "label": label} for n in range(12) for label in ("good", "bad")
    ]
    words = {"new_tokens": ("<|good|>", "<|bad|>"), "objective": "classify"}
    trained(tiny_model_dir("gpt2"), tmp_path / "a", rows, **words, steps=40, lr=1e-2)
    assert config_of(tmp_path / "a")["trainable_token_indices"] == [300, 301]
    data, model = write_rows(tmp_path / "rows.jsonl", rows), tiny_model_dir("gpt2")
    on = f"--model {model} --adapter {tmp_path / 'a'} --data {data} --storage fp32"
    assert result(f"eval {on}")["exact_match"] > 0.9


@pytest.mark.few(2)
@pytest.mark.parametrize("method", ["prompt", "prefix", "ia3", "dora"])
def test_other_methods_train_tokens_too(method: str, tiny_model_dir, template, tmp_path) -> None:
    base = tiny_model_dir("llama")
    done = trained(base, tmp_path / "a", method=method, chat_template=str(template), lr=1e-2)
    model = fresh_model(base)
    adapter = lf.load(model, tmp_path / "a")
    assert adapter.tokens == dict.fromkeys(("model.embed_tokens", "lm_head"), (300, 301))
    tokenizer = tokenizer_of(resolve_model(base), [tmp_path / "a"])
    asked = EvaluationSettings(completions=False)
    assert evaluate(model, tokenizer, ROWS, 64, asked).loss < done.losses[0]


def test_training_the_base_and_comparisons_refuse_new_tokens(tiny_model_dir, tmp_path) -> None:
    with pytest.raises(LorafoldError, match="tokens: Full trains the base's own weights"):
        trained(tiny_model_dir("llama"), tmp_path / "a", method="full")
    base = Base(tiny_model_dir("llama"), device="cpu")
    task = ComparisonTask(base, ROWS, ROWS, "rows", Recipe(new_tokens=("<|user|>",)))
    with pytest.raises(LorafoldError, match=r"new_tokens: found <\|user\|>, expected none"):
        compare(task, [Variant("lora")], [0], tmp_path / "c", lambda *_: None)
    assert list(tmp_path.iterdir()) == []


def halved(base: Path, path: Path, **how: Any) -> Path:
    return resaved(base, path, torch.bfloat16, **how)


@pytest.mark.parametrize("kind", ["gemma", "llama"])
def test_rows_are_rounded_to_the_nearest_and_hide_nothing(kind, tiny_model_dir, tmp_path) -> None:
    """A weak update that bf16 loses is seen to be lost, whatever is beside it."""
    base = halved(tiny_model_dir(kind), tmp_path / "base")
    model = fresh_model(base)
    adapter = lf.attach(model, lf.LoRA(rank=4), tokens=(301, 5, 300))
    generator = torch.Generator().manual_seed(0)
    for name, p in adapter.named_parameters():
        p.data += (1.0 if "rows" in name else 2e-5) * torch.randn(p.shape, generator=generator)
    with_rows = adapter.save(tmp_path / "with")
    rows = {
        path: delta.rows.detach().clone()
        for path, delta in adapter.deltas.items()
        if path in adapter.tokens and delta.twin is None
    }
    alone = tmp_path / "alone"
    shutil.copytree(with_rows, alone)
    (alone / MANIFEST).unlink()
    file = alone / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if "tokens_delta" not in k}, file)
    config = config_of(alone)
    del config["trainable_token_indices"]
    (alone / "adapter_config.json").write_text(json.dumps(config))
    for rounding in ("nearest", "auto", "stochastic"):
        how: dict[str, Any] = {"rounding": rounding, "certificate": False}
        mine, plain = (
            merge(str(base), [path], tmp_path / f"{path.name}-{rounding}", **how).folded
            for path in (with_rows, alone)
        )
        assert mine.stats == plain.stats
        assert rounding != "nearest" or mine.stats.survival < 0.98
        stored = load_file(tmp_path / f"with-{rounding}" / "model.safetensors")
        before, untouched = load_file(base / "model.safetensors"), [i for i in range(300) if i != 5]
        for path, values in rows.items():
            now, then = (tensors[f"{path}.weight"] for tensors in (stored, before))
            assert torch.equal(now[[301, 5, 300]], values.bfloat16())
            assert torch.equal(now[untouched], then[untouched])


@pytest.mark.parametrize("kind", ["gemma", "llama"])
def test_shards_grow_and_add_up(kind: str, tiny_model_dir, tmp_path: Path) -> None:
    base = halved(tiny_model_dir(kind), tmp_path / "base", max_shard_size="20KB")
    merge(str(base), [saved(base, tmp_path / "a", ["<|a|>"])], tmp_path / "m", certificate=False)
    index, before = (
        json.loads((path / "model.safetensors.index.json").read_text())
        for path in (tmp_path / "m", base)
    )
    files = [load_file(tmp_path / "m" / file) for file in set(index["weight_map"].values())]
    sizes = {name: t.nbytes for file in files for name, t in file.items()}
    assert sizes.keys() == index["weight_map"].keys() == before["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert load_model(tmp_path / "m", torch.bfloat16).get_input_embeddings().num_embeddings == 301


def test_a_tied_weight_that_is_stored_twice_stays_one(tiny_model_dir, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir("gemma"), base)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = saved(base, tmp_path / "a", ["<|a|>"])
    assert merge(str(base), [adapter], tmp_path / "m", device="cpu").gap.relative_logit_gap < 1e-5
    grown = load_file(tmp_path / "m" / "model.safetensors")
    assert torch.equal(grown["lm_head.weight"], grown["model.embed_tokens.weight"])
    model = load_model(tmp_path / "m", torch.float32)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_other_ids_for_a_tied_head_untie_it(tiny_model_dir, tmp_path: Path) -> None:
    base = tiny_model_dir("gpt2")
    model = fresh_model(base)
    adapter = lf.attach(
        model, lf.LoRA(rank=2), tokens=TrainableTokens({"wte": (300, 7), "lm_head": (300,)})
    )
    for p in adapter.parameters():
        p.data += 0.1
    adapter.save(tmp_path / "a")
    result = merge(str(base), [tmp_path / "a"], tmp_path / "m", device="cpu")
    assert result.folded.untied == ("lm_head.weight",)
    assert result.gap is not None
    assert result.gap.relative_logit_gap < 1e-5


def test_a_base_without_a_tokenizer_is_merged_all_the_same(tiny_model_dir, tmp_path: Path) -> None:
    base = tmp_path / "base"
    fresh_model(tiny_model_dir("llama")).save_pretrained(base)
    model = fresh_model(base)
    lf.attach(model, lf.LoRA(rank=2), tokens=(300,)).save(tmp_path / "a")
    merge(str(base), [tmp_path / "a"], tmp_path / "m", certificate=False)
    assert load_model(tmp_path / "m", torch.float32).config.vocab_size == 301


def test_a_config_says_its_vocabulary_where_it_has_it() -> None:
    llama = {"model_type": "llama"}
    assert with_vocabulary_size(llama, 7) == {**llama, "vocab_size": 7}
    vision = {"vision_config": {"vocab_size": 3}}
    nested = {"text_config": {"vocab_size": 5, "hidden_size": 2}} | vision
    found = with_vocabulary_size(nested, 7)
    assert found == {"text_config": {"vocab_size": 7, "hidden_size": 2}} | vision
    assert with_vocabulary_size({**nested, "vocab_size": 5}, 7)["vocab_size"] == 7


@pytest.mark.slow
def test_the_real_model_learns_roles(template: Path, smollm2: Path, tmp_path: Path) -> None:
    fields = {"chat_template": str(template), "steps": 6, "lr": 1e-3, "batch": 2, "max_length": 64}
    done = trained("smollm2", tmp_path / "a", **fields)
    assert done.losses[-1] < done.losses[0]
    assert config_of(tmp_path / "a")["trainable_token_indices"] == [49152, 49153]
    source = resolve_model("smollm2")
    tokenizer = tokenizer_of(source, [tmp_path / "a"])
    ids = tokenizer(
        tokenizer.apply_chat_template(ROWS[3]["messages"], tokenize=False), add_special_tokens=False
    ).input_ids
    model = load_model(source, torch.float32)
    lf.load(model, tmp_path / "a")
    theirs = in_peft(load_model(source, torch.float32), len(tokenizer), tmp_path / "a", ids)
    assert relative(theirs, logits(model, ids)) < 1e-5
    merge("smollm2", [tmp_path / "a"], tmp_path / "m", certificate=False)
    plain = load_model(tmp_path / "m", torch.float32)
    assert plain.config.vocab_size == 49154
    assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
