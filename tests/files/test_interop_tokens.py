"""Token rows both ways with PEFT, on bases with and without a resized vocabulary."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lorafold as lf
from adapter_files import assert_same_tensors, change, configure, json_of, tensors_of
from error_cases import refusal
from lorafold.models.weights import FileWeights, model_files
from peft_cases import CLOSE, gap, load_theirs, made_by_peft, moved, noise

KINDS = ["llama", "qwen2", "gemma", "gpt2"]
TIED = ["gemma", "gpt2"]
V, D = 300, 32
NEW = [301, 5, 300]
IDS = torch.tensor([[7, 300, 5, 9, 301, 5, 3, 300]])
TARGETS = {"gpt2": ["c_attn"]}


@pytest.fixture(autouse=True)
def _seeded_and_quiet() -> None:
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def resized(model: Any, size: int = V + 2, **how: Any) -> Any:
    model.resize_token_embeddings(size, **how)
    return model


def embedding(kind: str) -> str:
    return "wte" if kind == "gpt2" else "embed_tokens"


def at(kind: str, end: str = "embedding") -> str:
    path = "transformer.wte" if kind == "gpt2" else "model.embed_tokens"
    path = path if end == "embedding" else "lm_head"
    return f"base_model.model.{path}.token_adapter.trainable_tokens_delta"


def ours(kind: str, model: Any, tokens: Any = NEW) -> lf.Adapter:
    spec, targets = lf.LoRA(rank=4, alpha=8), TARGETS.get(kind, ["q_proj"])
    return moved(model, spec, targets, tokens=tokens)


def theirs(kind: str, base: Any, indices: Any, **options: Any) -> Any:
    targets = TARGETS.get(kind, ["q_proj"])
    return made_by_peft(base, peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM",
        trainable_token_indices=indices, **options,
    ))  # fmt: skip


def save_theirs(wrapped: Any, path: Path, matrices: bool) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it saves the embeddings too
        wrapped.save_pretrained(path, save_embedding_layers="auto" if matrices else False)
    return tensors_of(path)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_ours_on_a_resized_base(kind: str, tiny_model, tmp_path: Path) -> None:
    model = tiny_model(kind)
    expected = logits(model) if ours(kind, model).save(tmp_path / "a") else None
    tensors = tensors_of(tmp_path / "a")
    rows = {key: tuple(t.shape) for key, t in tensors.items() if "token" in key.rsplit(".", 2)[1]}
    assert rows == dict.fromkeys([at(kind), *([] if kind in TIED else [at(kind, "head")])], (3, D))
    indices = json_of(tmp_path / "a")["trainable_token_indices"]
    assert indices == (NEW if kind in TIED else {"embed_tokens": NEW, "lm_head": NEW})
    assert gap(logits(load_theirs(resized(tiny_model(kind)), tmp_path / "a")), expected) < CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_ours_is_read_on_the_base_resized_or_not(kind: str, tiny_model, tmp_path: Path) -> None:
    """A resized base is the same base, by its fingerprint too."""
    model = tiny_model(kind)
    ours(kind, model).save(tmp_path / "a")
    for name, base in (("plain", tiny_model(kind)), ("resized", resized(tiny_model(kind)))):
        loaded = lf.load(base, tmp_path / "a")
        assert torch.equal(logits(base), logits(model))
        loaded.save(tmp_path / name)
        assert_same_tensors(tmp_path / "a", tmp_path / name)
        assert json_of(tmp_path / "a") == json_of(tmp_path / name)
    # its fingerprint is of the longer matrices
    assert lf.load(tiny_model(kind), tmp_path / "resized")


@pytest.mark.few(5)
@pytest.mark.parametrize("matrices", [True, False], ids=["matrices", "rows-only"])
@pytest.mark.parametrize("form", ["list", "names"])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_is_read_on_the_base_resized_or_not(kind, form, matrices, tiny_model, tmp_path):
    base = resized(tiny_model(kind))
    same = copy.deepcopy(base)
    wrapped = theirs(kind, base, NEW if form == "list" else {embedding(kind): NEW, "lm_head": NEW})
    expected = logits(wrapped)
    tensors = save_theirs(wrapped, tmp_path / "a", matrices)
    assert any(k.endswith("base_layer.weight") for k in tensors) == matrices
    # PEFT repeats a tied head's rows
    assert (at(kind, "head") in tensors) == (form == "names" if kind not in TIED else matrices)
    lf.load(same, tmp_path / "a")
    assert gap(logits(same), expected) < CLOSE
    of_the_head = kind in TIED or form == "names" or matrices
    # resized once more, it got other rows at random
    for other in (tiny_model(kind), resized(tiny_model(kind))):
        if not of_the_head and other.config.vocab_size == V:
            told = refusal(lf.load, other, tmp_path / "a")
            assert "embed_tokens would have 302 tokens, lm_head would have 300 tokens" in told
            continue
        adapter = lf.load(other, tmp_path / "a")
        found, known = logits(other), None if of_the_head else V
        assert gap(found[..., :known], expected[..., :known]) < CLOSE
        again = adapter.save(tmp_path / f"again-{other.config.vocab_size}")
        adapter.detach()
        assert gap(logits(load_theirs(copy.deepcopy(resized(other)), again)), found) < CLOSE


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rows_of_padding_come_along(kind: str, tiny_model, tmp_path: Path) -> None:
    wrapped = theirs(kind, resized(tiny_model(kind), pad_to_multiple_of=8), [300, 301])
    expected = logits(wrapped)
    assert expected.shape[-1] == 304
    save_theirs(wrapped, tmp_path / "a", matrices=True)
    model = tiny_model(kind)
    adapter = lf.load(model, tmp_path / "a")
    assert gap(logits(model), expected) < CLOSE
    assert set(adapter.tokens.values()) == {(300, 301, 302, 303)}


@pytest.mark.parametrize("kind", KINDS)
def test_known_tokens_alone(kind: str, tiny_model, tmp_path: Path) -> None:
    """PEFT writes the rows and nothing more, of the embedding alone where the head has a weight."""
    wrapped = theirs(kind, tiny_model(kind), [9, 5])
    short = IDS.masked_fill(IDS >= V, 9)
    with torch.no_grad():
        expected = wrapped.eval()(short).logits
        save_theirs(wrapped, tmp_path / "a", matrices=True)
        model = tiny_model(kind)
        adapter = lf.load(model, tmp_path / "a")
        assert gap(model(short).logits, expected) < CLOSE
    assert len(adapter.tokens) == (2 if kind in TIED else 1)


def test_other_ids_for_a_tied_head(tiny_model, tmp_path: Path) -> None:
    ids = {"embed_tokens": [300, 301], "lm_head": [301, 300, 7]}
    wrapped = theirs("gemma", resized(tiny_model("gemma")), ids)
    expected = logits(wrapped)
    save_theirs(wrapped, tmp_path / "a", matrices=False)
    model = tiny_model("gemma")
    lf.load(model, tmp_path / "a")
    assert gap(logits(model), expected) < CLOSE


BESIDE = {"use_dora": True, "use_rslora": True, "bias": "all", "modules_to_save": ["model.norm"]}


@pytest.mark.parametrize("options", [dict([item]) for item in BESIDE.items()], ids=str)
def test_beside_what_else_lora_has(options: dict[str, Any], tiny_model, tmp_path: Path) -> None:
    wrapped = theirs(
        "qwen2", resized(tiny_model("qwen2")), {"embed_tokens": NEW, "lm_head": NEW}, **options
    )
    expected = logits(wrapped)
    save_theirs(wrapped, tmp_path / "a", matrices=True)
    model = tiny_model("qwen2")
    lf.load(model, tmp_path / "a").save(tmp_path / "b")
    assert gap(logits(model), expected) < CLOSE
    assert gap(logits(load_theirs(resized(tiny_model("qwen2")), tmp_path / "b")), expected) < CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_on_the_meta_device(kind: str, tiny_model, tiny_model_dir, tmp_path: Path) -> None:
    """A skeleton without data takes the rows as well, and a tied head goes on sharing them."""
    save_theirs(theirs(kind, resized(tiny_model(kind)), NEW), tmp_path / "a", matrices=True)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(tiny_model_dir(kind))
        )
    adapter = lf.load(skeleton, tmp_path / "a", base=FileWeights(model_files(tiny_model_dir(kind))))
    real = lf.load(tiny_model(kind), tmp_path / "a")
    assert all(p.device.type == "cpu" for p in adapter.parameters())
    for a, b in zip(adapter.parameters(), real.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(adapter.deltas.values(), real.deltas.values(), strict=True):
        assert bool(a.twin) == bool(b.twin)


def test_half_precision_base(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("gemma")
    ours("gemma", model).save(tmp_path / "a")
    half = tiny_model("gemma").bfloat16()
    adapter = lf.load(half, tmp_path / "a")
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    peer = load_theirs(resized(tiny_model("gemma").bfloat16()), tmp_path / "a")
    assert noise(logits(half), logits(model)) <= 2 * noise(logits(peer), logits(model))


ROWS, HEAD = at("llama"), "base_model.model.lm_head.weight"
MATRIX = ROWS.replace("trainable_tokens_delta", "base_layer.weight")
DEFECTS: dict[str, tuple[Any, str]] = {
    "another base": (
        lambda t: t[MATRIX].mul_(2), r"base_layer.weight: a base weight of shape \[302, 32\], but",
    ),
    "a row too few": (
        lambda t: t.update({ROWS: t[ROWS][:2]}),
        r"trainable_tokens_delta: shape \[2, 32\], expected \[3, 32\]",
    ),
    "too narrow": (
        lambda t: t.update({ROWS: t[ROWS][:, :16].clone()}), r"shape \[3, 16\], expected \[3, 32\]"
    ),
    "missing": (lambda t: t.pop(ROWS), f"missing key {ROWS}"),
    "not a number": (
        lambda t: t[ROWS][0].fill_(float("nan")),
        "trainable_tokens_delta: 32 of 96 values are not finite",
    ),
    "elsewhere": (
        lambda t: t.update({at("gpt2"): torch.zeros(3, D)}),
        "unknown key base_model.model.transformer.wte.token_adapter",
    ),
    "not a number in the head": (
        lambda t: t[HEAD][301].fill_(float("inf")),
        "lm_head.token_adapter.* 32 of 64 values are not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_reading_is_strict(defect: str, tiny_model, tmp_path: Path) -> None:
    save_theirs(theirs("llama", resized(tiny_model("llama")), NEW), tmp_path / "a", matrices=True)
    edit, message = DEFECTS[defect]
    change(tmp_path / "a", edit)
    model = tiny_model("llama")
    with pytest.raises(lf.LorafoldError, match=message) as caught:
        lf.load(model, tmp_path / "a")
    assert str(caught.value).count(";") == 0
    assert not any(hasattr(m, "deltas") for m in model.modules())


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([300, 302], r"tokens \[300, 302\] leave a gap: the base's last token is 299"),
        ({"wte": [300]}, "trainable_token_indices: found no module wte in this model"),
        (["300"], "trainable_token_indices: found"),
        ({"embed_tokens": [5], "lm_head": []}, r"lm_head: tokens: found \[\], expected"),
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense(indices: Any, message: str, tiny_model, tmp_path) -> None:
    ours("llama", tiny_model("llama")).save(tmp_path / "a")
    configure(tmp_path / "a", trainable_token_indices=indices)
    with pytest.raises(lf.LorafoldError, match=message):
        lf.load(tiny_model("llama"), tmp_path / "a")


def test_the_file_grows_by_rows(tiny_model, tmp_path: Path) -> None:
    sizes = []
    for tokens in ((), (300,), (300, 301)):
        path = ours("gemma", tiny_model("gemma"), tokens=tokens).save(tmp_path / str(len(tokens)))
        sizes.append(sum(t.nbytes for t in tensors_of(path).values()))
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] == 4 * D


def test_the_card_says_how_peft_loads_it(tiny_model, tmp_path: Path) -> None:
    ours("gemma", tiny_model("gemma")).save(tmp_path / "a")
    assert "model.resize_token_embeddings(302)" in (tmp_path / "a" / "README.md").read_text()
    assert json_of(tmp_path / "a", "lorafold.json")["vocabulary"] == 302
    ours("gemma", tiny_model("gemma"), tokens=(5,)).save(tmp_path / "b")
    assert "resize_token_embeddings" not in (tmp_path / "b" / "README.md").read_text()


def test_a_replaced_vocabulary_may_have_begun_with_other_new_rows(tiny_model, tmp_path):
    """transformers initializes new rows at random, so every resized base has its own."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = made_by_peft(resized(tiny_model("llama")), config)
    theirs.save_pretrained(tmp_path / "a")
    torch.manual_seed(2)
    model = resized(tiny_model("llama"))
    lf.load(model, tmp_path / "a")
    assert gap(logits(model), logits(theirs)) < CLOSE
    with pytest.raises(lf.LorafoldError, match=r"302 rows, but this base has 300; .*\(302\)"):
        lf.load(tiny_model("llama"), tmp_path / "a")
    other = resized(tiny_model("llama"))
    other.model.embed_tokens.weight.data[3] += 1
    with pytest.raises(lf.LorafoldError, match=r"embed_tokens.*differs from this base's"):
        lf.load(other, tmp_path / "a")
