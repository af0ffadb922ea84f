"""Merging mixtures of experts: each expert's tensor is written in its place."""

import json
import shutil
from collections.abc import Iterator
from functools import cache
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
import transformers as tf
from transformers.core_model_loading import Chunk, ConversionOps, MergeModulelist, WeightConverter

import lorafold as lf
import mixtures
from adapter_cases import IDS, relative
from adapter_files import assert_same_tensors, change, json_of
from adapter_files import tensors_of as tensors
from conftest import fast_only, make_tokenizer
from fresh_models import fresh_model
from lorafold.api.merge import merge
from lorafold.errors import LorafoldError, NotMergeable
from lorafold.files.atomic import verify
from lorafold.merging import merged_tensors
from lorafold.merging.plan import plan_merge
from lorafold.merging.run import Merged
from lorafold.models.checkpoint import mapped_model_of
from lorafold.models.fingerprint import of_model
from lorafold.models.loading import load_model, unquantized_weights
from lorafold.models.quantizations import Storage
from lorafold.models.sources import resolve_model
from lorafold.models.weight_conversion import Conversion, LazyTensor, SourceTensor
from lorafold.models.weights import read_container, write_container
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.recipe.recipe import Recipe
from lorafold.resolve import Base

pytestmark = pytest.mark.usefixtures("unestimated")

CONFIGS = {kind: of for kind, of in mixtures.CONFIGS.items() if kind != "deepseek-v3"} | {
    # one tensor of the files is several parameters
    "hrm": lambda: tf.HrmTextConfig(**mixtures.SHAPE),
}
MODEL = "model.safetensors"
CONVERTED = [kind for kind in CONFIGS if kind != "gpt-oss"]


def make(kind: str, path: Path, dtype: torch.dtype = torch.float32, size: str = "1GB", **o) -> Path:
    """A random model of that kind, the same each time, with its tokenizer."""
    tokenizer = make_tokenizer()
    config = CONFIGS[kind](**o)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    config.bos_token_id = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for p in model.parameters():
            torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.1)
    model.to(dtype).save_pretrained(path, max_shard_size=size)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """The directory of a model of a kind, by that and the largest size of its files."""
    return cache(lambda kind, **o: make(kind, tmp_path_factory.mktemp(kind) / "base", **o))


@torch.no_grad()
def logits(model) -> torch.Tensor:  # (T, vocabulary)
    return model(input_ids=IDS, use_cache=False).logits[0].float()


def adapted(base: Path, out: Path, storage=torch.float32, spec=None, size: float = 0.1, **options):
    """The model with an adapter of random values on it, which is saved to `out`."""
    model = load_model(base, storage)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapter = lf.attach(model, spec or lf.LoRA(rank=3, dropout=0.0), "all-linear")
        for p in adapter.parameters():
            p.data += size * torch.randn(p.shape)
    quantization = getattr(storage, "quantization", None)
    recipe = Recipe(storage=quantization or "auto").model_dump(mode="json")
    record = {"recipe": recipe} if quantization else None
    weights = unquantized_weights(resolve_model(base), storage) if quantization else None
    adapter.save(out, base=weights, record=record)
    return model, adapter


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> Path:
    """Short texts for the certificate."""
    file = tmp_path_factory.mktemp("probe") / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"Row {i} of a few"}) + "\n" for i in range(3)))
    return file


def layout(path: Path) -> dict[str, list]:
    return {
        file.name: [(e.name, e.dtype, e.shape) for e in read_container(file).entries.values()]
        for file in path.glob("*.safetensors")
    }


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("kind", "size"),
    fast_only(zip(CONFIGS, cycle(["60KB", "1GB"])), product(CONFIGS, ["1GB", "60KB"])),
)
def test_merged_is_adapted_and_the_files_are_as_they_were(kind, size, moe, probe, tmp_path) -> None:
    base = moe(kind, size=size)
    model, adapter = adapted(base, tmp_path / "a", spec=lf.DoRA(lf.LoRA(rank=3, dropout=0.0)))
    with lf.only(model):
        before = logits(model)
    expected = logits(model)
    assert relative(before, expected) > 1e-2  # the adapter does something
    result = merge(base, [tmp_path / "a"], tmp_path / "merged", device="cpu", probe=probe)
    assert relative(logits(load_model(tmp_path / "merged", torch.float32)), expected) < 1e-5
    assert result.gap is not None
    assert result.gap.relative_logit_gap < 1e-5
    assert result.folded.stats.survival == 1

    assert (len(layout(base)) > 4) == (size == "60KB")
    assert layout(tmp_path / "merged") == layout(base)
    assert verify(tmp_path / "merged") == []
    if size == "60KB":
        index = "model.safetensors.index.json"
        was, now = (json_of(path, index) for path in (base, tmp_path / "merged"))
        assert now["weight_map"] == was["weight_map"]
        assert now["metadata"]["total_size"] == was["metadata"]["total_size"]

    # in memory, and then saved by transformers: the same tensors
    adapter.merge()
    assert relative(logits(model), expected) < 1e-5
    model.save_pretrained(tmp_path / "saved")
    merged, saved, plain = map(tensors, (tmp_path / "merged", tmp_path / "saved", base))
    assert merged.keys() == saved.keys()
    for name, tensor in merged.items():
        assert relative(tensor, saved[name]) < 1e-6, name
    kept = {name for name, tensor in merged.items() if torch.equal(tensor, plain[name])}
    changed = merged.keys() - kept
    assert not [n for n in kept if "experts." in n and "bias" not in n]
    routers = (".gate.weight", ".router.weight", "shared_expert_gate.weight")
    assert not [n for n in changed if n.endswith((*routers, "bias")) or "norm" in n or "embed" in n]
    assert len(changed) == sum(result.folded.rounded.values())


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", CONFIGS)
def test_in_16_bits_small_updates_survive(kind, moe, probe, tmp_path) -> None:
    base = moe(kind, dtype=torch.bfloat16, size="60KB")
    adapted(base, tmp_path / "a", size=0.0005)
    result = merge(base, [tmp_path / "a"], tmp_path / "merged", device="cpu", probe=probe)
    assert layout(tmp_path / "merged") == layout(base)
    assert result.folded.rounded["stochastic"] > 4
    assert abs(result.folded.stats.survival - 1) < 0.05
    nearest = merge(base, [tmp_path / "a"], tmp_path / "n", rounding="nearest", certificate=False)
    assert nearest.folded.stats.survival < 0.95
    again = merge(base, [tmp_path / "a"], tmp_path / "again", certificate=False)
    assert again.folded == result.folded
    assert_same_tensors(tmp_path / "merged", tmp_path / "again")


def test_only_the_targeted_parameter_changes(moe, tmp_path) -> None:
    base = moe("mixtral")
    model = fresh_model(base)
    adapter = lf.attach(model, lf.LoRA(rank=2, dropout=0.0), ["layers.1.mlp.experts.gate_up_proj"])
    for p in adapter.parameters():
        p.data += 0.1
    adapter.save(tmp_path / "a")
    merge(base, [tmp_path / "a"], tmp_path / "merged", certificate=False)
    before, after = tensors(base), tensors(tmp_path / "merged")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {n for n in before if ".1.block_sparse_moe.experts." in n and ".w2." not in n}
    assert len(changed) == 8


def test_files_in_any_order_and_without_the_models_prefix(moe, tmp_path, monkeypatch) -> None:
    """It is folded with little memory, and gives the same values."""
    base = moe("mixtral")
    adapted(base, tmp_path / "a", size=0.01)
    odd = tmp_path / "odd"
    shutil.copytree(base, odd)
    file = odd / "model.safetensors"
    entries = read_container(base / "model.safetensors").entries
    order = sorted(entries, key=lambda n: (n.split(".")[-2:], n))
    renamed = [(n.removeprefix("model."), entries[n]) for n in order]
    write_container(file, renamed, {"format": "pt"}, lambda _: None, lambda *_: None)
    monkeypatch.setattr(merged_tensors, "MAX_CACHED", 1)
    for path in (base, odd):
        merge(path, [tmp_path / "a"], tmp_path / f"{path.name}-out", certificate=False)
    assert layout(tmp_path / "odd-out") == layout(odd)
    one, other = tensors(tmp_path / "base-out"), tensors(tmp_path / "odd-out")
    assert len(one) == len(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name.removeprefix("model.")]), name


@pytest.mark.few(4)
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2-moe", "gpt-oss"])
def test_into_the_dequantized_experts_that_were_trained_on(kind, quantization, moe, tmp_path):
    base = moe(kind)
    model, adapter = adapted(base, tmp_path / "a", Storage(torch.float32, quantization))
    result = merge(base, [tmp_path / "a"], tmp_path / "merged", certificate=False)
    assert (result.into.target, result.into.trained_on) == ("trained", quantization)
    adapter.merge()  # the loaded model's own codes, dequantized
    merged = load_model(tmp_path / "merged", torch.float32).state_dict()
    plain = fresh_model(base).state_dict()
    experts = [n for n in merged if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(experts) == 4
    for name in experts:
        assert relative(merged[name], model.state_dict()[name]) < 1e-6, name
        assert relative(merged[name], plain[name]) > 1e-3, name


def test_quantized_experts_cant_be_saved(moe, tmp_path) -> None:
    base = moe("mixtral")
    adapted(base, tmp_path / "a")
    with pytest.raises(LorafoldError, match=r"into nf4: found experts .*--quantization nf4"):
        merge(base, [tmp_path / "a"], tmp_path / "merged", into="nf4")
    assert not (tmp_path / "merged").exists()


def rows(n: int = 8) -> list[dict]:
    return [{"prompt": f"Copy {i}", "completion": f"{i} is {i}"} for i in range(n)]


def altered(base: Path, out: Path, part: str) -> Path:
    """The base with other values in the tensors whose names have this part."""
    shutil.copytree(base, out)
    changed = [name for name in tensors(base) if part in name]
    assert changed
    change(out, lambda t: t.update({name: t[name] + 0.01 for name in changed}), MODEL)
    return out


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_a_trained_adapter_knows_its_base_and_no_other(storage, moe, probe, tmp_path) -> None:
    base = moe("mixtral")
    recipe = Recipe(epochs=1, batch=4, storage=storage, rank=2)
    lf.train(recipe, data=rows(), out=tmp_path / "a", model=str(base))
    fingerprint = json_of(tmp_path / "a", "lorafold.json")["base"]
    assert any(name.endswith("experts.gate_up_proj") for name in fingerprint)
    assert not any("block_sparse_moe.experts" in name for name in fingerprint)
    result: Merged = merge(base, [tmp_path / "a"], tmp_path / "merged", probe=probe)
    assert result.gap is not None
    assert result.gap.kl < 1e-3
    for part in (".experts.", ".q_proj."):
        other = altered(base, tmp_path / f"other{part}", part)
        with pytest.raises(LorafoldError, match="the adapter was trained on another base"):
            merge(other, [tmp_path / "a"], tmp_path / "no")
        assert not (tmp_path / "no").exists()
    merge(other, [tmp_path / "a"], tmp_path / "yes", allow_other_base=True, certificate=False)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_fingerprint_of_files_is_that_of_the_loaded_model(kind, moe) -> None:
    base = moe(kind, size="60KB")
    mapped = mapped_model_of(resolve_model(base))
    assert of_model(mapped.model) == of_model(fresh_model(base))


@pytest.mark.parametrize("kind", CONVERTED)
def test_the_original_weights_have_the_model_s_names(kind, moe) -> None:
    base = moe(kind, size="60KB")
    weights = unquantized_weights(resolve_model(base), Storage(torch.float32, "nf4"))
    loaded = fresh_model(base).state_dict()
    assert weights is not None
    assert set(weights.names) <= loaded.keys()
    for name in weights.names:
        assert weights.find(name) == name
        assert weights.shape(name) == tuple(loaded[name].shape)
        assert weights.is_floating(name)
        assert torch.equal(weights.get(name), loaded[name])
        where = torch.stack([torch.randint(n, (9,)) for n in loaded[name].shape], 1)
        assert torch.equal(weights.elements(name, where), loaded[name][where.unbind(1)])


def on_demand(base: Path) -> Iterator[tuple[str, LazyTensor, torch.Tensor]]:
    """Each converted parameter, and its values as transformers loads them."""
    mapped = mapped_model_of(resolve_model(base))
    loaded = fresh_model(base).state_dict()
    for name in mapped.converted:
        yield name, mapped.model.get_parameter(name), loaded[name]


@pytest.mark.parametrize("kind", CONVERTED)
def test_a_converted_parameter_is_as_transformers_loads_it(kind, moe) -> None:
    found = 0
    for name, parameter, values in on_demand(moe(kind)):
        found += 1
        assert isinstance(parameter, LazyTensor)
        assert isinstance(parameter, torch.nn.Parameter)
        assert parameter.dtype == values.dtype
        assert torch.equal(parameter, values), name
        assert torch.equal(parameter.mT + 1, values.mT + 1)
        assert isinstance(parameter.mT, LazyTensor)
        assert parameter.to("meta").shape == values.shape
        assert torch.equal(parameter[1], values[1])
        where = torch.stack([torch.randint(n, (64,)) for n in values.shape])
        assert torch.equal(parameter[tuple(where)], values[tuple(where)])
    assert found >= 4


def test_a_converted_parameter_cant_be_written_to(moe) -> None:
    _, parameter, _ = next(on_demand(moe("mixtral")))
    with pytest.raises(LorafoldError, match="can't write to a weight"):
        parameter.data.zero_()
    with pytest.raises(LorafoldError, match="can't write to a weight"):
        parameter.data[0].add_(1)


def test_a_missing_expert_is_named(moe, tmp_path) -> None:
    base = tmp_path / "base"
    shutil.copytree(moe("mixtral"), base)
    for half, said in (
        ("w3", r"layers\.1\.mlp\.experts\.gate_up_proj: .*\(7, such as "),
        ("w1", r"gate_up_proj: shape \[3, 256, 64\], expected \[4,"),
    ):
        name = f"model.layers.1.block_sparse_moe.experts.2.{half}.weight"
        change(base, lambda t, name=name: t.pop(name), MODEL)
        with pytest.raises(LorafoldError, match=said):
            mapped_model_of(resolve_model(base))


def test_experts_of_several_dtypes_are_refused(moe, tmp_path) -> None:
    base = tmp_path / "base"
    shutil.copytree(moe("mixtral"), base)
    adapted(base, tmp_path / "a")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    change(base, lambda t: t.update({name: t[name].bfloat16()}), MODEL)
    asked, saved = Base(base, allow_other_base=True), SavedAdapter.open(tmp_path / "a")
    with pytest.raises(NotMergeable, match="stored as BF16 and F32"):
        plan_merge(asked, [saved])


class Doubled(ConversionOps):
    """A conversion without a reverse, or with a wrong one."""

    def convert(self, input_dict, source_patterns, target_patterns, **_):
        (tensors,) = input_dict.values()
        return {target_patterns[0]: 2 * tensors}


class Wrong(Doubled):
    @property
    def reverse_op(self):
        return Doubled()


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (Doubled(), "can't be reversed to the tensors"),
        (Wrong(), "gives other values for"),
        (Chunk(dim=1), "can't be reversed to the tensors"),
    ],
)
def test_a_conversion_that_cant_be_reversed_is_refused(op, message, moe, monkeypatch) -> None:
    mapped = mapped_model_of(resolve_model(moe("mixtral")))
    name = "model.layers.0.mlp.experts.down_proj"
    real = mapped.converted[name]
    pattern = ".experts.*.w2.weight"
    converter = WeightConverter(pattern, ".experts.down_proj", [MergeModulelist(dim=0), op])
    sources = [SourceTensor(s.entry, s.values, pattern, s.renamed) for s in real.sources]
    if isinstance(op, Chunk):
        sources = [SourceTensor(s.entry, s.values, pattern, f"{s.renamed}.x") for s in real.sources]
    conversion = Conversion(mapped.model, converter, name, sources)
    with pytest.raises(LorafoldError, match=message):
        conversion.check_reversible()
