"""Convolutions as a storage, against PEFT's and LyCORIS' own layers and in real models."""

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import lorafold as lf
from architectures import ARCHITECTURES
from conftest import lorafold, make_tokenizer
from fresh_models import fresh_model
from lorafold.core.combine import Bank, PerExample, Slots
from lorafold.core.spec import Spec
from lorafold.inspecting.resize import resize
from lorafold.layers import is_linear, layer_of
from lorafold.layers.convolution import Convolution
from lorafold.models.loading import load_model
from lorafold.models.sources import resolve_model
from lorafold.peft.adapter_directory import open_all
from lorafold.resolve import Base
from lycoris_cases import lycoris, their_change
from peft_cases import CLOSE, gap, move, save_theirs
from peft_cases import PAIRS as OF_PEFT

WEIGHTS = "adapter_model.safetensors"


class Net(nn.Module):
    """Two convolutions, of which the first is adapted or both, and a mean over the places."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        make: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        window = (3, 2, 3)[:dims]
        self.stem = make(6, 16, window, stride=2, padding=1)
        # PEFT can't merge a window of one place in three dimensions
        self.body = make(16, 12, (2, 1, 1) if dims == 3 else 1, bias=False)
        self.dims = dims

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(torch.tanh(self.stem(x)))


def net(dims: int) -> Net:
    torch.manual_seed(0)
    return Net(dims).eval()


def signal(dims: int) -> torch.Tensor:
    size = (2, 6, 9, 8, 7)[: dims + 2]
    return torch.randn(size, generator=torch.Generator().manual_seed(3))


BOTH = ["stem", "body"]
# our spec, and PEFT's config
CASES: dict[str, tuple[Spec, peft.PeftConfig]] = OF_PEFT | {
    "lora": (lf.LoRA(rank=4, alpha=6), peft.LoraConfig(r=4, lora_alpha=6)),
    "rslora": (
        lf.LoRA(rank=3, alpha=6, rslora=True),
        peft.LoraConfig(r=3, lora_alpha=6, use_rslora=True),
    ),
    "lokr": (lf.LoKr(rank=1, alpha=3), peft.LoKrConfig(r=1, alpha=3)),
    "ia3": (lf.IA3(feedforward=[]), peft.IA3Config(feedforward_modules=[])),
}
# what PEFT has no layer for, or computes otherwise (the whole w2 of a Conv1d)
LACKING = {("adalora", 1), ("ia3", 1), ("lokr-whole", 1)}
PAIRS = [
    pytest.param(c, d, id=f"{c}-{d}d") for c in CASES for d in (1, 2) if (c, d) not in LACKING
] + [pytest.param(c, 3, id=f"{c}-3d") for c in ("lora", "dora", "ia3")]


def ours(case: str, dims: int) -> tuple[Net, lf.Adapter]:
    model = net(dims)
    adapter = lf.attach(model, CASES[case][0], BOTH)
    move(adapter.parameters())
    return model, adapter


def theirs(case: str, dims: int, **more: Any) -> peft.PeftModel:
    config = CASES[case][1]
    options = {**config.to_dict(), "target_modules": BOTH, **more}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(net(dims), type(config)(**options)).eval()
    move(p for p in wrapped.parameters() if p.requires_grad)
    return wrapped


def load_theirs(dims: int, path: Path) -> Any:
    """PEFT's reading, in which a missing or unexpected key is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message in ("rank_pattern keys did not match", "Could not find a config file"):
            warnings.filterwarnings("ignore", message=f".*{message}.*")
        return peft.PeftModel.from_pretrained(net(dims), path).eval()


@torch.no_grad()
def output(model: nn.Module, dims: int) -> torch.Tensor:
    return model(signal(dims))


@pytest.mark.parametrize(("case", "dims"), PAIRS)
def test_peft_has_the_keys_computes_and_merges_alike(case: str, dims: int, tmp_path: Path) -> None:
    model, adapter = ours(case, dims)
    bare, expected = output(net(dims), dims), output(model, dims)
    assert gap(expected, bare) > 100 * CLOSE
    adapter.save(tmp_path / "a")
    save_theirs(theirs(case, dims), tmp_path / "b")
    a, b = (load_file(tmp_path / d / WEIGHTS) for d in "ab")
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    there = load_theirs(dims, tmp_path / "a")
    assert gap(output(there, dims), expected) < CLOSE
    adapter.merge()
    plain, merged = there.merge_and_unload(), dict(model.named_parameters())
    for name, p in plain.named_parameters():
        assert merged[name].shape == p.shape
        assert gap(merged[name].detach(), p.detach()) < CLOSE, name
    assert gap(output(model, dims), expected) < CLOSE


@pytest.mark.parametrize(("case", "dims"), PAIRS)
def test_ours_reads_peft_with_the_same_gradients(case: str, dims: int, tmp_path: Path) -> None:
    wrapped, x = theirs(case, dims), signal(dims).requires_grad_()
    save_theirs(wrapped, tmp_path / "a")
    model = net(dims)
    bare, expected = output(model, dims), output(wrapped, dims)
    adapter = lf.load(model, tmp_path / "a", trainable=True)
    assert gap(expected, bare) > 100 * CLOSE
    assert gap(output(model, dims), expected) < CLOSE
    gradients = []
    for m in (model, wrapped):
        x.grad = None
        m(x).sin().sum().backward()
        gradients.append(x.grad)
    assert gap(*gradients) < CLOSE
    # of the tensors too, as the file would hold them
    own = {n: p for n, p in adapter.named_parameters()}
    other = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    assert len(own) == len(other)
    by_norm = [sorted(p.grad.norm().item() for p in group.values()) for group in (own, other)]
    assert by_norm[0] == pytest.approx(by_norm[1], rel=1e-4)
    adapter.detach()
    assert torch.equal(output(model, dims), bare)


ALL: dict[str, Spec] = {name: spec for name, (spec, _) in CASES.items()} | {
    "pissa": lf.PiSSA(rank=3, alpha=5),
    "olora": lf.OLoRA(rank=3),
    "vera": lf.VeRA(rank=8),
    "dora-loha": lf.DoRA(lf.LoHa(rank=3)),
    "dora-lokr": lf.DoRA(lf.LoKr(rank=2)),
    "dora-pissa": lf.DoRA(lf.PiSSA(rank=3)),
    "dora-adalora": lf.DoRA(lf.AdaLoRA(rank=3)),
    "bitfit": lf.BitFit(),
    "lt-sft": lf.LTSFT(density=0.2),
    "fastfood": lf.Fastfood(dimension=30),
}


@pytest.mark.few(19)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("method", ALL)
def test_saved_and_loaded_is_the_same(method: str, dims: int, tmp_path: Path) -> None:
    model = net(dims)
    adapter = lf.attach(model, ALL[method], BOTH)
    move(adapter.parameters())
    expected = output(model, dims)
    adapter.save(tmp_path / "a")
    again = net(dims)
    lf.load(again, tmp_path / "a").save(tmp_path / "b")
    assert gap(output(again, dims), expected) < CLOSE
    a, b = (load_file(tmp_path / d / WEIGHTS) for d in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def with_lycoris(stem: Any) -> torch.Tensor:
    """The change that LyCORIS computes from the tensors of PEFT's LoKr of a Conv1d with a core."""
    from lycoris.functional.lokr import kron_weight

    names = ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    w1, w2a, w2b, t2 = (getattr(stem, name)["default"] for name in names)
    scale = stem.scaling["default"]
    return kron_weight(w1, None, None, None, w2a, w2b, t2.squeeze(-1), scale)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("case", ["loha", "lokr"])
def test_tucker_cores_of_peft_are_multiplied_in(case: str, dims: int, tmp_path: Path) -> None:
    wrapped = theirs(case, dims, use_effective_conv2d=True)
    save_theirs(wrapped, tmp_path / "a")
    keys = load_file(tmp_path / "a" / WEIGHTS)
    cores = [k for k in keys if re.search(r"_t\d$", k)]
    assert cores
    model = net(dims)
    adapter = lf.load(model, tmp_path / "a")
    if (case, dims) == ("lokr", 1):  # PEFT writes it but can't run it
        with pytest.raises(RuntimeError, match="view size"):
            output(wrapped, dims)
        with torch.no_grad():
            expected = with_lycoris(wrapped.base_model.model.stem)
            assert gap(adapter.deltas["stem"].delta().view(16, 6, 3), expected) < CLOSE
    else:
        assert gap(output(model, dims), output(wrapped, dims)) < CLOSE
    adapter.save(tmp_path / "b")
    assert gap(output(load_theirs(dims, tmp_path / "b"), dims), output(model, dims)) < CLOSE
    # a core without its factors is refused by its key
    del keys[cores[0].replace("_t", "_w") + "_a"]
    save_file(keys, tmp_path / "a" / WEIGHTS)
    with pytest.raises(lf.LorafoldError, match=f"unknown key {re.escape(cores[0])}"):
        lf.load(net(dims), tmp_path / "a")


def test_a_whole_w2_of_a_conv1d_is_never_misread(tmp_path: Path) -> None:
    """PEFT computes kron(w2, w1) there, in another order than with its own factors."""
    wrapped = theirs("lokr-whole", 1)
    stem: Any = wrapped.base_model.model.stem
    w1, w2 = stem.lokr_w1["default"], stem.lokr_w2["default"]
    right = torch.kron(w1[..., None], w2) * stem.scaling["default"]
    assert gap(stem.get_delta_weight("default"), right.view(16, 6, 3)) > 0.1
    save_theirs(wrapped, tmp_path / "theirs")
    with pytest.raises(lf.LorafoldError, match=r"lokr_w2: .*order differs from LyCORIS"):
        lf.load(net(1), tmp_path / "theirs")
    ours("lokr-whole", 1)[1].save(tmp_path / "ours")
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_theirs(1, tmp_path / "ours")


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr-both", "lokr-whole"])
def test_changes_equal_those_of_lycoris(kind: str, dims: int) -> None:
    model, weight = net(dims), net(dims).stem.weight.detach()
    rank = {"loha": 3, "lokr-whole": 8}.get(kind, 1)
    alpha, factor = 5 if kind == "loha" else rank, 4 if kind == "lokr-both" else -1
    spec, theirs = lycoris(kind, model.stem, rank, alpha, factor)
    adapter = lf.attach(model, spec, ["stem"])
    delta = adapter.deltas["stem"]
    expected = their_change(theirs, delta, weight.shape).view(weight.shape)
    function: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    with torch.no_grad():
        assert gap(delta.delta().view(weight.shape), expected) < CLOSE
        y = function(signal(dims), weight + expected, model.stem.bias, stride=2, padding=1)
        assert gap(model.stem(signal(dims)), y) < CLOSE
        adapter.merge()
        assert gap(model.stem.weight, weight + expected) < CLOSE


def grouped() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.Conv2d(8, 8, 3, groups=8))


@pytest.mark.parametrize("case", ["loha", "lokr"])
def test_groups_are_those_of_peft(case: str, tmp_path: Path) -> None:
    """The factors of LoHa and LoKr change the grouped weight itself."""
    config = CASES[case][1]
    options = {**config.to_dict(), "target_modules": ["0"]}
    wrapped = peft.get_peft_model(grouped(), type(config)(**options)).eval()
    move(p for p in wrapped.parameters() if p.requires_grad)
    save_theirs(wrapped, tmp_path / "a")
    model, x = grouped(), torch.randn(2, 8, 6, 6)
    lf.load(model, tmp_path / "a")
    with torch.no_grad():
        assert gap(model(x), wrapped(x)) < CLOSE


def test_lora_that_mixes_groups_is_refused_both_ways(tmp_path: Path) -> None:
    """PEFT's update there has all input channels, which no weight with groups can hold."""
    config = peft.LoraConfig(r=4, target_modules=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(grouped(), config)
    save_theirs(wrapped, tmp_path / "theirs")
    with pytest.raises(lf.LorafoldError, match=r"0\.lora_A\.weight: .*mixes the groups"):
        lf.load(grouped(), tmp_path / "theirs")
    model, x = grouped(), torch.randn(2, 8, 6, 6)
    adapter = lf.attach(model, lf.LoRA(rank=8, dropout=0.0), ["0", "1"])
    move(adapter.parameters())
    with torch.no_grad():
        y = model(x)
    adapter.save(tmp_path / "ours")
    with (
        pytest.raises(RuntimeError, match="size mismatch"),
        pytest.warns(UserWarning, match="groups"),
    ):
        peft.PeftModel.from_pretrained(grouped(), tmp_path / "ours")
    again = grouped()
    lf.load(again, tmp_path / "ours").merge()
    with torch.no_grad():
        assert gap(again(x), y) < CLOSE


def test_presets_leave_convolutions_out() -> None:
    assert not any(is_linear(m) for m in net(1).modules())
    with pytest.raises(lf.LorafoldError, match="all-linear"):
        lf.attach(net(1), lf.LoRA(), "all-linear")
    with pytest.raises(lf.LorafoldError, match="similar names: stem"):
        lf.attach(net(1), lf.LoRA(), ["stemm"])


@pytest.mark.parametrize(
    ("module", "spec", "message"),
    [
        (nn.ConvTranspose1d(4, 4, 3), lf.LoRA(), "0: .*LoRA.*transposed convolution, which is not"),
        (nn.ConvTranspose2d(4, 4, 3), lf.LoHa(), "0: .*LoHa.*transposed convolution, which is not"),
        (weight_norm(nn.Conv1d(4, 4, 3)), lf.LoRA(), "0: .*LoRA.*computed from other parameters"),
        (nn.Conv1d(4, 4, 3), lf.IA3(feedforward=["0"]), "0: .*IA3.*inputs are signals"),
        (nn.Conv1d(2, 4, 3), lf.PiSSA(rank=5), r"0: .*PiSSA.*rank 5 for a matrix \(4, 6\)"),
    ],
    ids=["transposed-1d", "transposed-2d", "weight-norm", "ia3-inputs", "rank"],
)
def test_what_cannot_be_adapted_is_refused(module: nn.Module, spec: Spec, message: str) -> None:
    root = nn.Sequential(module)
    with pytest.raises(lf.LorafoldError, match=message):
        lf.attach(root, spec, ["0"])
    assert type(root[0]) is type(module)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_and_single_signals_as_the_module_has_them(mode: str) -> None:
    torch.manual_seed(0)
    root = nn.Sequential(nn.Conv1d(4, 6, 5, padding="same", dilation=2, padding_mode=mode))
    adapter = lf.attach(root, lf.LoRA(rank=2, dropout=0.0), ["0"])
    move(adapter.parameters())
    x = torch.randn(4, 17)  # no batch
    with torch.no_grad():
        y, many = root(x), root(x[None])
        adapter.merge()
        assert gap(root(x), y) < CLOSE
        assert torch.equal(many[0], y)


def test_the_kernel_gets_no_gradient_and_an_embedded_adapter_reads_folded() -> None:
    model, adapter = ours("lora", 2)
    model(signal(2)).sum().backward()
    assert model.stem._parameters["weight"].grad is None
    folded = model.stem.weight
    assert folded.shape == net(2).stem.weight.shape
    y = F.conv2d(signal(2), folded, model.stem.bias, stride=2, padding=1)
    assert gap(y.detach(), output(model.stem, 2)) < CLOSE
    with lf.only(model):
        assert torch.equal(output(model, 2), output(net(2), 2))
    assert len(adapter.deltas) == 2


def test_dropout_acts_on_the_branch_alone() -> None:
    model = net(1)
    adapter = lf.attach(model, lf.LoRA(rank=2, dropout=0.5), ["stem"])
    move(adapter.parameters())
    model.train()
    x = signal(1)
    with torch.no_grad():
        runs = torch.stack([model.stem(x) for _ in range(600)])
        exact = output(model.eval().stem, 1)
    error = (runs.mean(0) - exact).norm() / (runs.std(0).norm() / 600**0.5)
    assert runs.std(0).norm() > 0
    assert error < 1.5  # the mean is the output without dropout


def test_one_delta_for_each_signal_of_a_batch() -> None:
    model = net(1)
    deltas = []
    for seed in (1, 2):
        delta = lf.LoRA(rank=seed, dropout=0.0).build(layer_of(model.stem))
        torch.manual_seed(seed)
        torch.nn.init.normal_(delta.B, std=0.3)
        deltas.append(delta)
    slots, x = Slots(torch.tensor([2, 0])), signal(1)
    layer = layer_of(model.stem)
    with torch.no_grad():
        y = PerExample(deltas, slots)(layer, x)
        assert gap(y[:1], deltas[1](layer, x[:1])) < CLOSE
        assert gap(y[1:], layer(x[1:])) < CLOSE
        assert gap(Bank(deltas, slots)(layer, x), y) < CLOSE


MODELS = {"whisper": ["conv1", "conv2", "q_proj"], "vit": ["projection"]}


@pytest.mark.few(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr"])
@pytest.mark.parametrize("kind", MODELS)
def test_trained_saved_loaded_and_merged(kind: str, method: str, dtype, tmp_path: Path) -> None:
    row = ARCHITECTURES[kind]
    batch = row.inputs() | row.trains()

    def outputs(model: Any, dtype: torch.dtype = dtype) -> Any:
        with torch.no_grad():
            given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
            return model(**given)

    model = row.model().to(dtype)
    bare, exact_bare = outputs(model), outputs(row.model(), torch.float32)
    adapter = lf.attach(model, CASES[method][0], MODELS[kind])
    convolutions = [p for p, m in adapter.sites.items() if isinstance(layer_of(m), Convolution)]
    assert len(convolutions) == (2 if kind == "whisper" else 1)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=2e-2)
    model.train()
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    for _ in range(12):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = outputs(model.eval())
    assert trained.loss < bare.loss
    adapter.save(tmp_path / "a")
    again, exact = row.model().to(dtype), row.model().double()
    merged = lf.load(again, tmp_path / "a")
    assert torch.equal(outputs(again).logits, trained.logits)
    merged.merge()
    logits = outputs(again).logits
    if dtype is torch.float32:
        assert gap(logits, trained.logits) < CLOSE
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            there = peft.PeftModel.from_pretrained(row.model(), tmp_path / "a")
        # merged, since PEFT's layer has no stride, which Whisper's encoder asks for
        assert gap(outputs(there.merge_and_unload().eval()).logits, trained.logits) < CLOSE
        return
    # merged weights are stored in bf16, as those of a bare model; calling is as exact
    lf.load(exact, tmp_path / "a").merge()
    reference = outputs(exact, torch.float64).logits
    bare_error = (bare.logits.double() - exact_bare.logits.double()).norm()
    assert (trained.logits.double() - reference).norm() < 4 * bare_error
    assert (logits.double() - reference).norm() < 6 * bare_error


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model with depthwise convolutions, saved."""
    path, tokenizer = tmp_path_factory.mktemp("mamba"), make_tokenizer()
    torch.manual_seed(0)
    config = tf.MambaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=4,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    tf.MambaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def on_mamba(base: Path, out: Path, spec: Spec, seed: int = 0) -> torch.Tensor:
    """Save an adapter of the convolutions, and return the logits of the model with it."""
    model = fresh_model(base)
    torch.manual_seed(seed)
    adapter = lf.attach(model, spec, ["conv1d"])
    move(adapter.parameters())
    adapter.save(out)
    return mamba_logits(model)


@torch.no_grad()
def mamba_logits(model: Any) -> torch.Tensor:
    return model(torch.arange(3, 23).view(1, -1)).logits


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr"])
def test_the_command_merges_convolutions_in_their_files(method: str, mamba, tmp_path) -> None:
    expected = on_mamba(mamba, tmp_path / "a", CASES[method][0])
    assert gap(expected, mamba_logits(load_model(mamba, torch.float32))) > 1e-3
    done = lorafold(
        "merge", "--adapter", str(tmp_path / "a"), "--model", str(mamba),
        "--out", str(tmp_path / "m"), "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert gap(mamba_logits(load_model(tmp_path / "m", torch.float32)), expected) < CLOSE


@pytest.mark.slow
def test_adapters_of_convolutions_are_inspected_resized_and_composed(mamba, tmp_path) -> None:
    source = resolve_model(str(mamba))
    expected = on_mamba(mamba, tmp_path / "a", lf.LoRA(rank=4))
    on_mamba(mamba, tmp_path / "b", lf.LoRA(rank=2), seed=1)
    assert "rank" in str(lf.inspect(tmp_path / "a", model=str(mamba)))
    resize(Base(source), open_all([tmp_path / "a"]), tmp_path / "r", rank=4)
    model = load_model(mamba, torch.float32)
    adapter = lf.load(model, tmp_path / "r")
    assert gap(mamba_logits(model), expected) < CLOSE
    adapter.detach()
    lf.compose(
        [tmp_path / "a", tmp_path / "b"], tmp_path / "c", model=str(mamba), weights=[1.0, 0.0]
    )
    lf.load(model, tmp_path / "c")
    assert gap(mamba_logits(model), expected) < CLOSE
    found = lf.estimate(str(mamba), "lora", max_length=64, recipe=lf.Recipe(targets=["conv1d"]))
    delta = lf.attach(model, lf.LoRA(rank=16), ["conv1d"], name="counted")
    assert found.terms["adapter"] == 4 * sum(p.numel() for p in delta.parameters())


def test_adapters_lie_over_one_another() -> None:
    """The branch of the upper one is a convolution too, whatever lies below."""
    model, x = net(2), signal(2)
    for name, spec in {"a": lf.LoRA(rank=2), "b": lf.DoRA(), "c": lf.LoRA(rank=3)}.items():
        move(lf.attach(model, spec, BOTH, name=name).parameters())
    model.eval()
    y = output(model, 2)
    w, b = model.stem.layer("a", "b", "c").dense()
    kernel = w.view(model.stem.weight.shape)
    with torch.no_grad():
        hidden = torch.tanh(F.conv2d(x, kernel, b, stride=2, padding=1))
        assert gap(model.body(hidden), y) < CLOSE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_fresh_adapter_changes_no_bit(dtype: torch.dtype) -> None:
    model, x = net(2).to(dtype), signal(2).to(dtype)
    with torch.no_grad():
        bare = model(x)
        lf.attach(model, lf.LoRA(dropout=0.0), BOTH)
        assert torch.equal(model(x), bare)
        assert torch.equal(copy.deepcopy(model)(x), bare)
