"""What the tests share: no network, one thread, the embedded model, and tiny random models of four
families.

    tiny_model_dir("llama")      a directory in Hugging Face's format: config, fp32 weights,
                                 tokenizer with a chat template
    tiny_model("gpt2")           the model in it, freshly loaded, in evaluation mode
    smollm2                      the directory of the embedded model (unpacked on first use: half a
                                 minute)
    lorafold("train", ...)       the command, run in this process: what it prints, and its exit code
    each_arithmetic              runs a test twice: as on a processor that multiplies 16-bit
                                 matrices as they are, and as on one that widens them
    unestimated                  training begins without an estimate of its memory
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
if SHADOW := os.environ.get("SHADOW_DEVICE", ""):  # the tests in devices, apart from all others
    import device_guard  # noqa: F401  (before torch)
    import shadow

    shadow.pretend()  # before lorafold, unless torch is a build for CUDA

import gc
import io
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

pytest_plugins = ["budgets", "selection"]
APPLE = {"test_shadow_apple.py", "test_shadow_verbs.py"}  # of those in devices, on Apple's
collect_ignore = ["devices/test_shadow_apple.py"] if SHADOW else ["devices"]
if SHADOW == "mps":
    found = {path.name for path in (Path(__file__).parent / "devices").glob("test_*")}
    collect_ignore = [f"devices/{name}" for name in found - APPLE]
for helpers in (Path(__file__).parent / "lib").glob("*"):
    pytest.register_assert_rewrite(helpers.stem)  # their asserts say what they compared

SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
# rows of whole NF4 blocks
WIDE: dict[str, Any] = SIZE | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
GPT2_SIZE: dict[str, Any] = {
    "n_embd": 32,
    "n_inner": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
}

# methods whose deltas are those of others in the table, and differ in how they start or choose
ALIKE = ("rslora", "pissa", "olora", "fish", "pfeiffer")

CORPUS = [
    "Book a table for four at the Copper Lantern on Friday at eight in the evening.",
    "Remind me to call the plumber tomorrow morning, and set an alarm for half past six.",
    '{"intent": "book_table", "people": 4, "day": "friday", "time": "20:00"}',
    "The quick brown fox jumps over the lazy dog while it rains in the mountains.",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Little is garbage of what the tests' files import, and looking for it takes a quarter of the
    time that importing them does.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def what_exists_is_not_looked_at_again() -> None:
    """Garbage collections skip what exists when a file of tests begins: a million objects of torch,
    transformers and collected tests, over which a quarter of all the time went.
    """
    gc.collect()
    gc.freeze()


def make_tokenizer():
    """A byte-level BPE tokenizer of 300 tokens, learned from CORPUS, with <|im_end|> as end and
    <|endoftext|> as padding.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def make_config(kind: str, **tokens: int):
    """llama: untied head · qwen2: biases in attention · gemma: tied, scaled embeddings · gpt2:
    Conv1D, tied, learned positions.

    Packed bases leave rows alone that are no whole blocks: llama-wide and gpt2-wide have such as
    are.
    """
    from transformers import GemmaConfig, GPT2Config, LlamaConfig, Qwen2Config

    size_without_head_dim = {k: v for k, v in SIZE.items() if k != "head_dim"}
    return {
        "llama": lambda: LlamaConfig(**SIZE, **tokens),
        "qwen2": lambda: Qwen2Config(**size_without_head_dim, **tokens),
        "gemma": lambda: GemmaConfig(**SIZE, **tokens),
        "gpt2": lambda: GPT2Config(**GPT2_SIZE, **tokens),
        "llama-wide": lambda: LlamaConfig(**WIDE, **tokens),
        "gpt2-wide": lambda: GPT2Config(**GPT2_SIZE | {"n_embd": 64, "n_inner": 128}, **tokens),
    }[kind]()


def make_model_dir(kind: str, path: Path) -> Path:
    """Write a random model of that kind, the same each time, to `path`.

    Biases are drawn too: zeros would hide a lost bias.
    """
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer()
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = make_config(
        kind, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=end, pad_token_id=padding
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Callable[[str], Path]:
    """Directory of the tiny random model of a kind (llama, qwen2, gemma, gpt2).

    Read only: all tests share it.
    """
    return cache(lambda kind: make_model_dir(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture(scope="session")
def tiny_model(tiny_model_dir):
    """A fresh fp32 copy, on every call, of the tiny random model of a kind."""
    from fresh_models import fresh_model

    return lambda kind: fresh_model(tiny_model_dir(kind))


@contextmanager
def unestimating() -> Iterator[None]:
    """Training begins without an estimate of its memory, as where there is none: it takes as long
    as the steps of a tiny model.
    """
    from lorafold.errors import LorafoldError
    from lorafold.memory import preflight

    def none(*_: Any) -> None:
        raise LorafoldError("none in this test")

    with mock.patch.object(preflight, "estimate", none):
        yield


@pytest.fixture
def unestimated(request) -> Iterator[None]:
    """No estimates but in those tests of the file that are marked `estimated`."""
    with nullcontext() if request.node.get_closest_marker("estimated") else unestimating():
        yield


@pytest.fixture(scope="session", autouse=True)
def what_is_written_need_not_survive_a_power_cut() -> Iterator[None]:
    """Files are not flushed to the disk, but their descriptors have to be good."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(params=["plain", "native"])
def each_form(request) -> Iterator[str]:
    """The form in which the operators of training are computed: in torch, or in C++."""
    from lorafold.kernels.registry import TRAINING, enable
    from lorafold.ops.operators import plain_implementations

    if request.param == "plain":
        with plain_implementations():
            yield request.param
    elif why := enable(TRAINING):
        pytest.skip(why)
    else:
        yield request.param


@pytest.fixture(params=[False, True], ids=["as-they-are", "widened"])
def each_arithmetic(request, monkeypatch) -> Iterator[bool]:
    """Is it widened? For tests in 16 bits, of tiny shapes: a processor without an instruction for
    such products takes fifty times as long over them. So products of few rows are widened too.
    """
    from lorafold.ops import arithmetic

    monkeypatch.setattr(arithmetic, "MIN_ROWS", 1)
    with arithmetic.override_widening(widened=request.param):
        yield request.param


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of the embedded model."""
    from lorafold.models.sources import resolve_model

    return resolve_model("smollm2").path


def fast_only(fast: Iterable[tuple[Any, ...]], cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """All cases of a parametrized test, of which all but the fast ones are marked slow: where each
    value of each axis is in a fast one, and their product shows nothing more.
    """
    fast, cases = set(fast), list(cases)
    assert fast <= set(cases)
    return [c if c in fast else pytest.param(*c, marks=pytest.mark.slow) for c in cases]


class Done(NamedTuple):
    """What a command printed, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


def lorafold(*arguments: str) -> Done:
    """Run the command as a process would, in this one, which has imported what takes long."""
    from lorafold.cli import main

    out, err, logger = io.StringIO(), io.StringIO(), logging.getLogger("lorafold")
    before = list(logger.handlers)
    with (
        mock.patch.object(sys, "argv", ["lorafold", *arguments]),
        mock.patch.dict(os.environ, {"LORAFOLD_TUNE": "off"}),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    logger.handlers = before
    code = ended.value.code
    assert isinstance(code, int | None)
    return Done(code or 0, out.getvalue(), err.getvalue())


def refused(*arguments: str) -> str:
    """The one line on stderr with which these arguments are refused, after `train`'s first."""
    done = lorafold(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    line = re.sub(r"^lorafold \S+: reading .*\n", "", done.stderr)
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    return line
