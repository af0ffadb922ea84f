"""A command imports no module that it does not use, and collects no garbage over those it does."""

import subprocess
import sys

import pyarrow as pa
import pytest

from lorafold.data.arrow import column, to_batch


def said(script: str) -> str:
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.slow
def test_training_rows_are_tokenized_without_pandas():
    assert said("""
import sys
from lorafold.data.examples import encode
from lorafold.data.rows import check_rows
from lorafold.models.tokenizer import load_tokenizer
rows = check_rows([(1, {"prompt": "two", "completion": "three"})], "rows")
found = encode(rows, load_tokenizer("smollm2"), 64)
print(len(found.examples), "pandas" in sys.modules)
""") == "1 False"


def test_a_quantized_base_needs_no_compiler_and_its_import_leaves_the_compiler_as_it_was():
    assert said("""
import sys, torch
before = torch.compile
from lorafold.layers.bitsandbytes import import_bitsandbytes
import_bitsandbytes()
print("torch._inductor.compile_fx" in sys.modules, torch.compile is before)
""") == "False True"


@pytest.mark.slow
def test_what_other_libraries_import_on_the_way_says_nothing():
    pytest.importorskip("peft")  # imports bitsandbytes, for transformers' Trainer
    script = "import lorafold, sys; lorafold.AdapterCallback; print('bitsandbytes' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("True", "")


@pytest.mark.slow
def test_what_bitsandbytes_would_compile_is_compiled_by_its_first_call():
    assert said("""
import torch
from lorafold.layers.bitsandbytes import import_bitsandbytes
made, real = [], torch.compile
def compiler(function, **options):
    made.append((function.__name__, options))
    return real(function, **options, backend="eager")
torch.compile = compiler
import_bitsandbytes()
assert not made and torch.compile is compiler
from bitsandbytes.backends.default.ops import _dequantize_blockwise_compute as compute
codes, code = torch.arange(8, dtype=torch.uint8), torch.arange(8.0)
for _ in range(2):
    print(compute(codes, torch.tensor([2.0, 3.0]), code, 4, torch.float32).int().tolist(), made)
""").splitlines() == [
        "[0, 2, 4, 6, 12, 15, 18, 21] [('_dequantize_blockwise_compute', {'dynamic': False})]"
    ] * 2


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 100])
def test_columns_are_those_that_pyarrow_makes_of_python_values(n):
    values, marks = [i - 5 for i in range(n)], [i % 3 == 1 for i in range(n)]
    words = ["ü" * (i % 4) for i in range(n)]
    nested = [values[:i] for i in range(n)]
    each = zip(values, nested, marks, words, strict=True)
    entries = [{"n": v, "l": of, "f": m, "t": w} for v, of, m, w in each]
    columns = to_batch(entries, ["n"], ["l"], ["f"], ["t"])
    expected = (
        pa.array(values, pa.int32()), pa.array(nested, pa.list_(pa.int32())),
        pa.array(marks, pa.bool_()), pa.array(words, pa.string()),
    )  # fmt: skip
    for made, wanted in zip(columns, expected, strict=True):
        made.validate(full=True)
        assert made.equals(wanted)
    table = pa.Table.from_batches([to_batch(entries[i:], ["n"]) for i in (0, 2)])
    assert column(table, "n").tolist() == values + values[2:]


SET_ASIDE = """
import gc, sys, types, weakref
from lorafold.runtime.process_tuning import existing_frozen, imports_frozen

class Cycle:
    def __init__(self):
        self.me = self

def dies(one):
    gone = weakref.ref(one)
    del one
    gc.collect()
    return gone() is None

def many(prefix):
    sys.modules.update({f"{prefix}{n}": types.ModuleType(prefix) for n in range(len(sys.modules))})

calls = list(gc.callbacks)
with existing_frozen():
    print(gc.get_freeze_count() > 0, dies(Cycle()))
print(gc.get_freeze_count())
with imports_frozen():
    many("first")
    gc.collect()
    aside = gc.get_freeze_count()
    print(aside > 0, dies(Cycle()), gc.get_freeze_count() <= aside)
    many("second")
    gc.collect()
    print(gc.get_freeze_count() > aside)
with existing_frozen():
    pass
print(gc.callbacks == calls, gc.isenabled(), len(gc.get_objects()) < gc.get_freeze_count())
"""


def test_imported_modules_are_set_aside_and_garbage_is_still_collected():
    assert said(SET_ASIDE).splitlines() == [
        "True True", "0", "True True True", "True", "True True True"
    ]  # fmt: skip


def test_an_interrupt_that_comes_in_a_callback_of_the_collector_is_not_lost():
    """While a command imports, every third Ctrl-C was told and passed over."""
    assert said("""
import gc, signal, time
from lorafold.runtime.process_tuning import imports_frozen
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background has not
def late(phase, about):
    gc.callbacks.remove(late)
    raise KeyboardInterrupt
with imports_frozen():
    gc.callbacks.append(late)
    try:
        gc.collect()
        for _ in range(200):
            time.sleep(0.01)
        print("passed over")
    except KeyboardInterrupt:
        print("interrupted")
""") == "interrupted"
