"""Merging on disk: the merged model gives the adapted model's output, or nothing is written."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import lorafold as lf
from adapter_cases import adapted_logits, differs, logits, make_adapter, relative, resaved
from adapter_files import configure, json_of, tensors_of
from conftest import fast_only
from fresh_models import fresh_model
from lorafold.api.merge import merge
from lorafold.cli import app
from lorafold.errors import LorafoldError, NotMergeable
from lorafold.files.atomic import verify
from lorafold.fold.plan import changed_shapes
from lorafold.layers import layer_of
from lorafold.merging.merged_tensors import before_and_after, check_disk_space, write_merged
from lorafold.merging.plan import plan_merge
from lorafold.methods import METHODS
from lorafold.models.loading import load_model
from lorafold.models.tokenizer import load_tokenizer
from lorafold.models.weights import read_tensors
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.resolve import Base

OPAQUE = ("houlsby", "pfeiffer", "prompt", "prefix")
MODEL = "model.safetensors"
FAMILIES = ["llama", "qwen2", "gemma", "gpt2"]


@pytest.mark.parametrize(
    ("kind", "sharded"),
    fast_only(zip(FAMILIES, cycle([True, False])), product(FAMILIES, [False, True])),
)
def test_fp32_merged_is_adapted(kind, sharded, tiny_model_dir, tmp_path):
    size = "20KB" if sharded else "1GB"
    base = resaved(tiny_model_dir(kind), tmp_path / "base", max_shard_size=size)
    assert sharded == (base / "model.safetensors.index.json").exists()
    adapter = make_adapter(base, tmp_path / "adapter")
    result = merge(str(base), [adapter], tmp_path / "merged", device="cpu")
    assert differs(tmp_path / "merged", base, adapter) < 1e-5
    assert differs(tmp_path / "merged", base) > 1e-3  # the adapter does something
    assert result.gap is not None
    assert result.gap.relative_logit_gap < 1e-5
    assert result.gap.argmax_agreement > 0.99
    assert result.folded.stats.survival == 1
    names = [{p.name for p in path.glob("model*")} for path in (base, tmp_path / "merged")]
    assert names[0] == names[1]


def test_what_no_adapter_changes_is_kept_to_the_byte(tiny_model_dir, tmp_path):
    base = tiny_model_dir("llama")
    adapter = make_adapter(base, tmp_path / "adapter", targets=["q_proj"])
    merge(str(base), [adapter], tmp_path / "merged", certificate=False)
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name}
    words = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
    for file in ("config.json", *words, "chat_template.jinja"):
        same = json.loads if file.endswith(".json") else str
        assert same((base / file).read_text()) == same((tmp_path / "merged" / file).read_text())
    assert verify(tmp_path / "merged") == []


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_are_folded(kind, bias, tiny_model_dir, tmp_path):
    base = tiny_model_dir("qwen2" if kind == "llama" else kind)
    targets = ["q_proj", "v_proj"] if kind == "llama" else ["c_attn"]
    adapter = make_adapter(base, tmp_path / "adapter", targets=targets, bias=bias)
    merge(str(base), [adapter], tmp_path / "merged", certificate=False)
    assert differs(tmp_path / "merged", base, adapter) < 1e-5


def test_two_adapters_fold_in_order(tiny_model_dir, tmp_path):
    base = tiny_model_dir("llama")
    first = make_adapter(base, tmp_path / "first", seed=1, targets=["q_proj", "down_proj"])
    second = make_adapter(base, tmp_path / "second", seed=2, targets="all-linear")
    merge(str(base), [first, second], tmp_path / "merged", certificate=False)
    assert differs(tmp_path / "merged", base, first, second) < 1e-5


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", ["gemma", "gpt2"])
@pytest.mark.parametrize("where", ["head", "embedding", "both"])
def test_tied_weights_are_untied(kind, where, tiny_model_dir, tmp_path):
    base = tiny_model_dir(kind)
    embedding = "wte" if kind == "gpt2" else "embed_tokens"
    targets = {"head": ["lm_head"], "embedding": [embedding], "both": ["lm_head", embedding]}[where]
    adapter = make_adapter(base, tmp_path / "adapter", targets=targets)
    result = merge(str(base), [adapter], tmp_path / "merged", certificate=False)
    assert result.folded.untied == ("lm_head.weight",)
    assert json_of(tmp_path / "merged", "config.json")["tie_word_embeddings"] is False
    model = load_model(tmp_path / "merged", torch.float32)
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    assert relative(logits(model), adapted_logits(base, adapter)) < 1e-5


def test_a_head_trained_whole_is_untied_and_replaced(tiny_model_dir, tmp_path):
    base = tiny_model_dir("gemma")
    adapter = make_adapter(
        base, tmp_path / "adapter", targets=["q_proj"], modules_to_save=["lm_head", "model.norm"]
    )
    result = merge(str(base), [adapter], tmp_path / "merged", certificate=False)
    assert result.folded.untied == ("lm_head.weight",)
    assert differs(tmp_path / "merged", base, adapter) < 1e-5


def test_a_checkpoint_without_the_base_prefix_merges(tiny_model_dir, tmp_path):
    """GPT-2's own files say `h.0.attn.c_attn.weight` where the model says `transformer.h.0...`."""
    base = resaved(tiny_model_dir("gpt2"), tmp_path / "base")
    tensors = {k.removeprefix("transformer."): t for k, t in tensors_of(base).items()}
    save_file(tensors, base / MODEL, metadata={"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter", targets=["c_attn", "lm_head"])
    merge(str(base), [adapter], tmp_path / "merged", certificate=False)
    assert set(tensors_of(tmp_path / "merged")) == {*tensors, "lm_head.weight"}
    assert differs(tmp_path / "merged", base, adapter) < 1e-5


@pytest.mark.slow
def test_a_plain_transformers_process_loads_it(tiny_model_dir, tmp_path):
    base = tiny_model_dir("qwen2")
    adapter = make_adapter(base, tmp_path / "adapter")
    merge(str(base), [adapter], tmp_path / "merged", certificate=False)
    script = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
kind = dict(dtype=torch.float32, output_loading_info=True)
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], **kind)
AutoTokenizer.from_pretrained(sys.argv[1])
assert not any(info.values()), info
assert not any(name.split(".")[0] in ("lorafold", "peft") for name in sys.modules)
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(3, 43).view(1, -1)).logits[0], sys.argv[2])
"""
    command = [sys.executable, "-c", script, tmp_path / "merged", tmp_path / "logits.pt"]
    subprocess.run(command, check=True, capture_output=True)
    assert relative(torch.load(tmp_path / "logits.pt"), adapted_logits(base, adapter)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weak_adapter_survives_16_bits(dtype, tiny_model_dir, tmp_path):
    base = resaved(tiny_model_dir("llama"), tmp_path / "base", dtype)
    size = 2e-5 if dtype == torch.bfloat16 else 3e-6
    adapter = make_adapter(base, tmp_path / "adapter", size=size)
    lost = merge(str(base), [adapter], tmp_path / "nearest", rounding="nearest", certificate=False)
    kept = merge(str(base), [adapter], tmp_path / "auto", seed=3, certificate=False)
    assert lost.folded.stats.survival < 0.98
    stored, before = tensors_of(tmp_path / "auto"), tensors_of(base)
    exact = fresh_model(base)
    lf.load(exact, adapter).merge()
    # unbiased: each element's error, times its update, is a random number of mean 0
    after, parts = exact.state_dict(), []
    for name, w in stored.items():
        parts.append((w.double() - after[name]) * (after[name] - before[name].double()))
    terms = torch.cat([part.flatten() for part in parts])
    assert abs(terms.sum()) < 5 * terms.norm()
    survival = 1 + terms.sum().item() / kept.folded.stats.update
    assert kept.folded.stats.survival == pytest.approx(survival, rel=1e-3)
    assert {t.dtype for t in stored.values()} == {dtype}


def test_same_seed_same_bytes_whatever_the_shards(tiny_model_dir, tmp_path):
    model = tiny_model_dir("llama")
    single = resaved(model, tmp_path / "single", torch.bfloat16)
    sharded = resaved(model, tmp_path / "sharded", torch.bfloat16, max_shard_size="20KB")
    adapter = make_adapter(single, tmp_path / "adapter", size=2e-5)

    def weights(base: Path, seed: int, out: str) -> dict[str, torch.Tensor]:
        how = {"rounding": "stochastic", "seed": seed, "certificate": False}
        merge(str(base), [adapter], tmp_path / out, **how)
        return tensors_of(tmp_path / out)

    first, other = weights(single, 0, "a"), weights(single, 1, "d")
    for again in (weights(single, 0, "b"), weights(sharded, 0, "c")):
        assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def test_the_certificate_is_what_a_comparison_in_memory_finds(tiny_model_dir, tmp_path):
    base = resaved(tiny_model_dir("llama"), tmp_path / "base", torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter")
    text = "Book a table for four at the Copper Lantern on Friday."
    probe = tmp_path / "probe.jsonl"
    probe.write_text(json.dumps({"text": text}) + "\n")
    result = merge(str(base), [adapter], tmp_path / "merged", probe=probe, device="cpu")
    tokenizer = load_tokenizer(base)
    ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
    model = fresh_model(base)
    lf.load(model, adapter)
    with torch.no_grad():
        p = model(input_ids=ids).logits[0].double()
        q = load_model(tmp_path / "merged", torch.float32)(input_ids=ids).logits[0].double()
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean().item()
    assert result.gap is not None
    assert result.gap.positions == ids.shape[1]
    assert result.kl == pytest.approx(kl, rel=1e-3)
    assert result.gap.max_logit_gap == pytest.approx((p - q).abs().max().item(), rel=1e-3)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert result.gap.argmax_agreement == pytest.approx(agreement)
    recorded = json_of(tmp_path / "merged", "merge.json")
    assert recorded == result.as_json()
    figures = {"kl", "max_logit_gap", "argmax_agreement", "update_survival", "rounding_noise"}
    assert figures | {"rounding", "seed", "out"} <= set(recorded)


def test_the_command_prints_json_and_refuses_an_existing_out(tiny_model_dir, tmp_path):
    base, runner = tiny_model_dir("llama"), CliRunner()
    adapter = make_adapter(base, tmp_path / "adapter")
    arguments = ["merge", "--model", str(base), "--adapter", str(adapter), "--device", "cpu"]
    arguments += ["--out", str(tmp_path / "merged")]
    done = runner.invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert json.loads(done.stdout.splitlines()[-1])["kl"] < 1e-6
    before = (tmp_path / "merged" / "merge.json").stat().st_mtime_ns
    with pytest.raises(LorafoldError, match="exists"):
        runner.invoke(app, arguments, catch_exceptions=False)
    assert (tmp_path / "merged" / "merge.json").stat().st_mtime_ns == before
    more = [*arguments, "--overwrite", "--no-certificate"]
    again = runner.invoke(app, more, catch_exceptions=False)
    assert "survives" in again.stdout
    assert json_of(tmp_path / "merged", "merge.json")["kl"] is None


def test_another_format_is_a_writer(tiny_model_dir, tmp_path):
    base, found, sizes = tiny_model_dir("llama"), {}, []
    adapter = make_adapter(base, tmp_path / "a")

    def write(planned, values, written):
        for file in planned.checkpoint.files:
            for name, entry in planned.layout(file):
                own = values(name)
                found[name] = read_tensors(entry.file, [name])[name] if own is None else own
                written(name, entry.size)

    planned = plan_merge(Base(base), [SavedAdapter.open(adapter)])
    folded = write_merged(planned, write, progress=lambda done, total: sizes.append((done, total)))
    merge(str(base), adapter, tmp_path / "merged", certificate=False)
    expected = tensors_of(tmp_path / "merged")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert sum(folded.rounded.values()) > 0
    assert sizes[-1] == (planned.weight_bytes,) * 2


def test_the_summary_counts_in_words(tiny_model_dir, tmp_path):
    base = tiny_model_dir("llama")
    adapter = make_adapter(base, tmp_path / "a", targets=["layers.0.self_attn.q_proj"])
    result = merge(str(base), [adapter], tmp_path / "one", certificate=False)
    assert "(1 tensor kept as computed)" in result.summary()
    for n, tensors, biases in ((1, "1 tensor", "1 bias was"), (2, "2 tensors", "2 biases were")):
        folded = replace(result.folded, rounded={"nearest": n}, biases=("b",) * n)
        told = replace(result, folded=folded).summary()
        assert f"({tensors} rounded to nearest)" in told
        assert f"  {biases} added and enabled in config.json" in told


def refused(base: Path, adapters: list[Path], out: Path, match: str) -> str:
    """The message of a refusal that left nothing behind, neither at `out` nor beside it."""
    beside = set(out.parent.iterdir())
    with pytest.raises(LorafoldError, match=match) as caught:
        merge(str(base), adapters, out, certificate=False)
    assert set(out.parent.iterdir()) == beside
    return str(caught.value)


@pytest.mark.parametrize(("sharded", "targets"), [(False, None), (True, ["q_proj"])], ids=str)
def test_added_biases_are_switched_on_in_the_config(sharded, targets, tiny_model_dir, tmp_path):
    size = "20KB" if sharded else "1GB"
    base = resaved(tiny_model_dir("llama"), tmp_path / "base", max_shard_size=size)
    adapter = make_adapter(base, tmp_path / "adapter", spec=lf.BitFit(), targets=targets)
    result = merge(str(base), [adapter], tmp_path / "merged", device="cpu")
    model = load_model(tmp_path / "merged", torch.float32)
    assert relative(logits(model), adapted_logits(base, adapter)) < 1e-5
    assert (model.config.attention_bias, model.config.mlp_bias) == (True, targets is None)
    assert result.folded.untied == ()
    biases = 7 if targets is None else 4
    assert len(result.folded.biases) == model.config.num_hidden_layers * biases
    assert "biases were added" in result.summary()
    # zeros where only the queries were trained
    assert model.model.layers[0].self_attn.o_proj.bias.any() == (targets is None)


def test_what_a_plain_model_cannot_hold_is_found_by_the_plan(tiny_model_dir, tmp_path):
    """A trained bias on linears that have none whatever the config says."""
    base = tiny_model_dir("gemma")
    adapter = make_adapter(base, tmp_path / "adapter", spec=lf.BitFit())
    said = "mlp.*adds a bias.*GemmaForCausalLM can't have one"
    refused(base, [adapter], tmp_path / "merged", said)


@pytest.mark.few(9)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_planned_and_folded_by_the_one_law(method, tiny_model):
    """What the plan finds by shapes is what folding changes; nothing in `merge` knows a method."""
    model = tiny_model("gpt2")
    adapter = lf.attach(model, METHODS[method]())
    generator = torch.Generator().manual_seed(0)
    for p in adapter.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    for module in adapter.sites.values():
        if method in OPAQUE:
            with pytest.raises(NotMergeable, match="can't be merged"):
                changed_shapes(module, ["default"])
            continue
        dense = module.layer("default").dense()
        expected = [None if t is None else t.detach().clone() for t in dense]
        found = changed_shapes(module, ["default"])
        stored = {name: before_and_after(module, ["default"], name)[1] for name in found}
        for name, values in stored.items():
            module._parameters[name].data = values
        for after, wanted in zip(layer_of(module).dense(), expected, strict=True):
            assert after is wanted is None or relative(after, wanted) < 1e-6


def test_wrong_inputs_are_refused_and_leave_nothing(tiny_model_dir, tmp_path):
    base = resaved(tiny_model_dir("llama"), tmp_path / "base", max_shard_size="20KB")
    adapter = make_adapter(base, tmp_path / "adapter")
    work = tmp_path / "work"
    work.mkdir()
    refused(base, [], work / "out", "no adapter")
    refused(base, [tmp_path / "absent"], work / "out", "absent")
    refused(tiny_model_dir("gpt2"), [adapter], work / "out", "adapter|base|target")

    config = (base / "config.json").read_text()
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    configure(base, "config.json", quantization_config=packed)
    refused(base, [adapter], work / "out", "quantized")
    (base / "config.json").write_text(config)
    configure(base, "config.json", num_hidden_layers=3)
    told = refused(base, [adapter], work / "out", "missing in the weight files.* and [0-9]+ more")
    assert "model.layers.2.self_attn.q_proj.weight" in told
    (base / "config.json").write_text(config)
    shard = sorted(base.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refused(base, [adapter], work / "out", shard.name)
    shard.unlink()
    refused(base, [adapter], work / "out", shard.name)


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(LorafoldError, match="GB left"):
        check_disk_space(tmp_path, 1 << 60, "the merged model")


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_nothing(tiny_model_dir, tmp_path):
    resource = pytest.importorskip("resource")
    base = tiny_model_dir("llama")
    adapter = make_adapter(base, tmp_path / "adapter")
    work = tmp_path / "work"
    work.mkdir()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # noqa: E731  (the weights take 150 kB)
    command = [sys.executable, "-m", "lorafold", "merge", "--no-certificate", "--model", base]
    command += ["--adapter", adapter, "--out", work / "out"]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "was not written" in done.stderr
    assert list(work.iterdir()) == []
