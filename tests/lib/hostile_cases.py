"""Adapters that mean harm: each function turns the copy of a good adapter into one, and says what
it attacks.

    for case in CASES: case.make(folder, base)      an entry of the directory `folder`
    stop = moving(folder)                           files of it change from now on, until stop()

`CASES` are by name, with whether the server has to tell that they are wrong; the others may be
served, as long as nobody else notices.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

GOOD = "good"  # the entry that is copied
CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "lorafold.json"
SLOW = "(([a-z._0-9])+)+X"  # takes twice as long for each character that it is tried on
HELLO = "{% for m in messages %}{{ m.content }}{% endfor %}"
# what a probe has, and no request of a user
PROBED = "{% if 'probe' in messages[0].content %}" + HELLO + "{% else %}"
MANY = 10**6
OFFSETS = "data_offsets"  # where a tensor begins and ends


@dataclass(frozen=True)
class Case:
    """One hostile adapter: its name, what it attacks, and whether it has to be told as wrong."""

    name: str
    attacks: str
    wrong: bool
    alter: Callable[..., None]

    def make(self, folder: Path, base: Path) -> None:
        """Make it in a directory of adapters that has a good one.

        Args:
            folder: the directory.
            base: the base's directory, whose tokenizer it may have.
        """
        at = folder / self.name
        shutil.copytree(folder / GOOD, at)
        (at / "manifest.json").unlink()  # which would tell that anything was changed
        self.alter(at, base) if self.name.startswith("tokenizer") else self.alter(at)


CASES: dict[str, Case] = {}


def wrong(alter: Callable[..., None], told: bool = True) -> Callable[..., None]:
    """A case that the server has to name among those that are wrong."""
    name = alter.__name__.replace("_", "-")
    CASES[name] = Case(name, (alter.__doc__ or "").strip(), told, alter)
    return alter


def either(alter: Callable[..., None]) -> Callable[..., None]:
    """A case that may be served."""
    return wrong(alter, told=False)


# Configurations.


def config(at: Path, **fields: Any) -> None:
    """Change fields of the configuration."""
    found = json.loads((at / CONFIG).read_text())
    (at / CONFIG).write_text(json.dumps(found | fields))


def raw(at: Path, before: str, after: str, name: str = CONFIG) -> None:
    """Write a field as no library would."""
    text = (at / name).read_text()
    assert before in text, before
    (at / name).write_text(text.replace(before, after, 1))


@wrong
def config_deep(at: Path) -> None:
    """JSON nested 100,000 deep ends a parser's stack."""
    (at / CONFIG).write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")


@wrong
def config_deep_objects(at: Path) -> None:
    """Objects nested 900 deep end the stack of whoever walks them."""
    raw(at, '"bias"', '"x": ' + '{"a":' * 900 + "1" + "}" * 900 + ', "bias"')


@wrong
def config_million_keys(at: Path) -> None:
    """A million unknown keys, for each of which there is something to say."""
    config(at, **{f"k{i}": 1 for i in range(MANY)})


@wrong
def config_many_keys(at: Path) -> None:
    """Fewer unknown keys, as many as pass a limit."""
    config(at, **{f"k{i}": 1 for i in range(60_000)})


@wrong
def config_huge(at: Path) -> None:
    """A file of 300 MB."""
    with (at / CONFIG).open("wb") as file:
        file.write(b'{"a": "')
        file.truncate(300 << 20)


@wrong
def config_nan(at: Path) -> None:
    """An alpha that is no number."""
    config(at, lora_alpha=float("nan"))


@wrong
def config_overflow(at: Path) -> None:
    """An alpha that a parser reads as infinity."""
    raw(at, '"lora_alpha": 4', '"lora_alpha": 1e999')


@either
def config_minus_overflow(at: Path) -> None:
    """An alpha that overflows in fp32."""
    raw(at, '"lora_alpha": 4', '"lora_alpha": -1e308')


@either
def config_large_alpha(at: Path) -> None:
    """An alpha that makes logits infinite at run time."""
    config(at, lora_alpha=1e38)


@wrong
def config_huge_rank(at: Path) -> None:
    """A rank that would make factors of terabytes."""
    config(at, r=10**9)


@wrong
def config_large_rank(at: Path) -> None:
    """A rank that would make factors of some gigabytes, which a machine may have."""
    config(at, r=10**6)


@wrong
def config_rank_pattern_huge(at: Path) -> None:
    """The same by a pattern, of one module."""
    config(at, rank_pattern={"q_proj": 10**9})


@wrong
def config_negative_rank(at: Path) -> None:
    """A negative rank."""
    config(at, r=-1)


@wrong
def config_no_rank(at: Path) -> None:
    """A rank of nothing, by which alpha is divided."""
    config(at, r=0)


@wrong
def config_digits(at: Path) -> None:
    """A number of 5,000 digits, which takes quadratic time to read."""
    raw(at, '"r": 2', '"r": 1' + "0" * 5000)


@wrong
def config_fewer_digits(at: Path) -> None:
    """A number of 4,000 digits, which Python reads and nothing else can hold."""
    raw(at, '"lora_alpha": 4', '"lora_alpha": 1' + "0" * 4000)


@wrong
def config_rank_digits(at: Path) -> None:
    """A rank of 4,000 digits."""
    raw(at, '"r": 2', '"r": 1' + "0" * 4000)


@wrong
def config_layer_digits(at: Path) -> None:
    """The number of a layer, of 4,000 digits."""
    raw(at, '"bias"', '"layers_to_transform": [1' + "0" * 4000 + '], "bias"')


@wrong
def config_duplicates(at: Path) -> None:
    """A key that is there twice, of which parsers read one or the other."""
    raw(at, '"r": 2', '"r": 2, "r": 3')


@wrong
def config_bom(at: Path) -> None:
    """A byte-order mark before JSON."""
    (at / CONFIG).write_bytes(b"\xef\xbb\xbf" + (at / CONFIG).read_bytes())


@wrong
def config_not_utf8(at: Path) -> None:
    """Bytes that are no UTF-8."""
    (at / CONFIG).write_bytes((at / CONFIG).read_bytes().replace(b"CAUSAL_LM", b"\xff\xfe\xc0"))


@wrong
def config_utf16(at: Path) -> None:
    """UTF-16, which parsers of JSON detect."""
    (at / CONFIG).write_bytes((at / CONFIG).read_text().encode("utf-16"))


@wrong
def config_nul(at: Path) -> None:
    """Nothing but NUL."""
    (at / CONFIG).write_bytes(bytes(1000))


@wrong
def config_list(at: Path) -> None:
    """A list where an object is expected."""
    (at / CONFIG).write_text("[]")


@either
def config_surrogate(at: Path) -> None:
    """A text that can't be written as UTF-8, wherever it is told or kept."""
    config(at, base_model_name_or_path="\ud800")


@wrong
def config_surrogate_key(at: Path) -> None:
    """The same in an unknown key, which an error names."""
    raw(at, '"bias"', '"\\ud800": 1, "bias"')


@either
def config_long_base(at: Path) -> None:
    """The name of a base of 4 MB, which lists of models show."""
    config(at, base_model_name_or_path="x" * (4 << 20))


@wrong
def config_long_type(at: Path) -> None:
    """A method of 4 MB, which an error quotes."""
    config(at, peft_type="x" * (4 << 20))


@wrong
def config_type_list(at: Path) -> None:
    """A method that can't be looked up in a table."""
    config(at, peft_type=[{"a": {}}])


@either
def config_dora_switch(at: Path) -> None:
    """Switches that are lists."""
    config(at, task_type=["SEQ_CLS"], inference_mode={"a": 1})


# Patterns.


@wrong
def pattern_targets(at: Path) -> None:
    """A regular expression of target modules that takes exponential time."""
    config(at, target_modules=SLOW)


@wrong
def pattern_excluded(at: Path) -> None:
    """The same, of modules to leave out."""
    config(at, exclude_modules=SLOW)


@wrong
def pattern_layers(at: Path) -> None:
    """The same, of layers."""
    config(at, layers_pattern=SLOW, layers_to_transform=[0])


@wrong
def pattern_ranks(at: Path) -> None:
    """The same, of ranks."""
    config(at, rank_pattern={SLOW: 2})


@wrong
def pattern_alphas(at: Path) -> None:
    """The same, of alphas."""
    config(at, alpha_pattern={SLOW: 2})


@wrong
def pattern_saved(at: Path) -> None:
    """The same, of modules to save."""
    config(at, modules_to_save=[SLOW])


@either
def pattern_just_slow(at: Path) -> None:
    """One that takes about a second to match all modules, in the server too."""
    config(at, exclude_modules="(([a-z._0-9])+){1,2}(([a-z._0-9])+){1,2}(([a-z._0-9])+)X")


@wrong
def pattern_many(at: Path) -> None:
    """Hundreds of thousands of patterns of ranks."""
    config(at, rank_pattern={f"no{i}": 2 for i in range(300_000)})


@either
def pattern_some(at: Path) -> None:
    """As many patterns as pass a limit, each of them tried on each module."""
    config(at, alpha_pattern={f"no{i}": 2 for i in range(20_000)})


@wrong
def pattern_huge(at: Path) -> None:
    """A pattern of megabytes, which takes seconds to compile."""
    config(at, target_modules="|".join(f"(a{i}?b*)" for i in range(300_000)))


@wrong
def pattern_counts(at: Path) -> None:
    """Counts of counts, whose automaton has billions of states."""
    config(at, target_modules="((((a{1,500}){1,500}){1,500}){1,500})b")


@wrong
def pattern_nested(at: Path) -> None:
    """Groups nested 5,000 deep."""
    config(at, target_modules="(" * 5000 + "a" + ")" * 5000)


@either
def targets_million(at: Path) -> None:
    """Hundreds of thousands of names of target modules."""
    config(at, target_modules=["q_proj", *(f"no{i}" for i in range(400_000))])


@wrong
def targets_long(at: Path) -> None:
    """The name of a target module of 4 MB, to which similar ones are looked for."""
    config(at, target_modules=["x" * (4 << 20)])


@wrong
def saved_many(at: Path) -> None:
    """Hundreds of thousands of modules to save."""
    config(at, modules_to_save=[f"no{i}" for i in range(400_000)])


# Weights.


def header(at: Path, change: Callable[[dict[str, Any], bytes], tuple[Any, bytes]]) -> None:
    """Write the weights anew, with another header and other data."""
    content = (at / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    head, data = change(json.loads(content[8 : 8 + size]), content[8 + size :])
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    (at / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def first(head: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """A header with something else said of its first tensor."""
    name = next(key for key in head if key != "__metadata__")
    return head | {name: head[name] | changed}


@wrong
def weights_long_header(at: Path) -> None:
    """A header of a terabyte, by its length."""
    (at / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 40) + (at / WEIGHTS).read_bytes()[8:])


@wrong
def weights_negative_header(at: Path) -> None:
    """A header of a negative length."""
    (at / WEIGHTS).write_bytes(struct.pack("<q", -1) + (at / WEIGHTS).read_bytes()[8:])


@wrong
def weights_large_header(at: Path) -> None:
    """A header of 20 MB of spaces, beside tensors that are right."""
    header(at, lambda head, data: (json.dumps(head).encode() + b" " * (20 << 20), data))


@wrong
def weights_large_header_nan(at: Path) -> None:
    """The same with values that are not finite, which nobody looks for behind such a header."""
    header(
        at, lambda head, data: (json.dumps(head).encode() + b" " * (20 << 20), b"\xff" * len(data))
    )


@wrong
def weights_overlap(at: Path) -> None:
    """Two tensors in one place."""
    header(at, lambda head, data: (head | {"x": {**list(head.values())[-1]}}, data))


@wrong
def weights_many(at: Path) -> None:
    """A hundred thousand empty tensors."""
    none = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header(at, lambda head, data: (head | {f"{i}": none for i in range(100_000)}, data))


@wrong
def weights_some(at: Path) -> None:
    """Ten thousand unknown tensors, for each of which there is something to say."""
    none = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header(at, lambda head, data: (head | {f"{i}": none for i in range(10_000)}, data))


@wrong
def weights_shape(at: Path) -> None:
    """A shape whose product overflows to the right size."""
    header(at, lambda head, data: (first(head, shape=[2**32, 2**32]), data))


@wrong
def weights_deep(at: Path) -> None:
    """A header of nested lists."""
    header(at, lambda head, data: (b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", data))


@wrong
def weights_dtype(at: Path) -> None:
    """A type that there is not."""
    header(at, lambda head, data: (first(head, dtype="F4096"), data))


@wrong
def weights_dtype_list(at: Path) -> None:
    """A type that is no text."""
    header(at, lambda head, data: (first(head, dtype=["F32"]), data))


@wrong
def weights_trailing(at: Path) -> None:
    """Bytes after the tensors, behind a header that was seen before."""
    header(at, lambda head, data: (head, data + bytes(4096)))


@wrong
def weights_metadata(at: Path) -> None:
    """Metadata that is none, in a header that is otherwise known."""
    header(at, lambda head, data: (head | {"__metadata__": {"format": [1]}}, data))


@wrong
def weights_twice(at: Path) -> None:
    """A tensor that is there twice."""
    header(at, lambda head, data: (doubled(head), data))


def doubled(head: dict[str, Any]) -> bytes:
    """A header whose first tensor is there twice, first with another shape."""
    name = next(key for key in head if key != "__metadata__")
    other = json.dumps({name: head[name] | {"shape": [1, 1]}})
    return (other[:-1] + "," + json.dumps(head)[1:]).encode()


@wrong
def weights_cut(at: Path) -> None:
    """A file that ends in the middle of its data."""
    (at / WEIGHTS).write_bytes((at / WEIGHTS).read_bytes()[:-100])


@wrong
def weights_empty(at: Path) -> None:
    """A file of nothing."""
    (at / WEIGHTS).write_bytes(b"")


@wrong
def weights_pickle(at: Path) -> None:
    """A pickle under another name."""
    (at / WEIGHTS).write_bytes(b"\x80\x04cposix\nsystem\n(S'touch /tmp/hostile-ran'\ntR.")


@wrong
def weights_missing(at: Path) -> None:
    """No weights but a pickle."""
    (at / WEIGHTS).rename(at / "adapter_model.bin")


@wrong
def weights_nan(at: Path) -> None:
    """NaN in fp32."""
    header(at, lambda head, data: (head, b"\xff" * 4 + data[4:]))


def halves(kind: str, bits: bytes) -> Callable[[Path], None]:
    """Weights of a type of 16 bits, all of them with these bits."""

    def alter(at: Path) -> None:
        def change(head: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
            found = {
                name: about | {"dtype": kind, "data_offsets": [n // 2 for n in about[OFFSETS]]}
                for name, about in head.items() if name != "__metadata__"
            }  # fmt: skip
            return found, bits * (len(data) // 4)

        header(at, change)

    return alter


@wrong
def weights_inf_f16(at: Path) -> None:
    """Infinity in fp16."""
    halves("F16", b"\x00\x7c")(at)


@wrong
def weights_nan_bf16(at: Path) -> None:
    """NaN in bf16."""
    halves("BF16", b"\xc0\x7f")(at)


@wrong
def weights_nan_f8(at: Path) -> None:
    """NaN in a type of 8 bits."""

    def change(head: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
        found = {
            name: about | {"dtype": "F8_E4M3", "data_offsets": [n // 4 for n in about[OFFSETS]]}
            for name, about in head.items() if name != "__metadata__"
        }  # fmt: skip
        return found, b"\x7f" * (len(data) // 4)

    header(at, change)


@either
def weights_huge_values(at: Path) -> None:
    """Finite values that make logits infinite at run time."""
    header(at, lambda head, data: (head, struct.pack("<f", 1e38) * (len(data) // 4)))


@wrong
def weights_codes(at: Path) -> None:
    """Integers where floats are expected."""
    header(at, lambda head, data: (first(head, dtype="I32"), data))


# Files.


@wrong
def file_link(at: Path) -> None:
    """Weights that are a link to a file of the machine's."""
    (at / WEIGHTS).unlink()
    (at / WEIGHTS).symlink_to("/etc/passwd")


@wrong
def file_loop(at: Path) -> None:
    """A link to itself."""
    (at / WEIGHTS).unlink()
    (at / WEIGHTS).symlink_to(WEIGHTS)


@either
def file_dangling(at: Path) -> None:
    """A link to nothing, beside files that are right."""
    (at / "notes.txt").symlink_to("nowhere")


@wrong
def file_hard_link(at: Path) -> None:
    """Weights that are another adapter's file."""
    (at / WEIGHTS).unlink()
    os.link(at.parent / GOOD / "README.md", at / WEIGHTS)


@wrong
def file_pipe(at: Path) -> None:
    """A pipe, whose reader waits for ever."""
    (at / RECORD).unlink()
    os.mkfifo(at / RECORD)


@wrong
def file_pipe_weights(at: Path) -> None:
    """The same for the weights."""
    (at / WEIGHTS).unlink()
    os.mkfifo(at / WEIGHTS)


@wrong
def file_pipe_manifest(at: Path) -> None:
    """The same for the manifest."""
    os.mkfifo(at / "manifest.json")


@wrong
def file_pipe_tokenizer(at: Path) -> None:
    """The same for the tokenizer."""
    os.mkfifo(at / "tokenizer_config.json")


@wrong
def file_device(at: Path) -> None:
    """A device that gives zeros without end, or what takes its place without the rights."""
    (at / RECORD).unlink()
    try:
        os.mknod(at / RECORD, 0o020644, os.makedev(1, 5))
    except OSError:
        (at / RECORD).symlink_to("/dev/zero")


@wrong
def file_socket(at: Path) -> None:
    """A socket."""
    (at / RECORD).unlink()
    here = os.getcwd()
    os.chdir(at)  # an address is short
    try:
        socket.socket(socket.AF_UNIX).bind(RECORD)
    finally:
        os.chdir(here)


@wrong
def file_sparse(at: Path) -> None:
    """Weights of 5 GB of nothing."""
    os.truncate(at / WEIGHTS, 5 << 30)


@wrong
def file_sparse_within(at: Path) -> None:
    """Weights of 3 GB, which a limit lets through, after tensors that are right."""
    os.truncate(at / WEIGHTS, 3 << 30)


@wrong
def file_sparse_tokenizer(at: Path) -> None:
    """A tokenizer of 3 GB."""
    (at / "tokenizer_config.json").write_text("{}")
    (at / "tokenizer.json").touch()
    os.truncate(at / "tokenizer.json", 3 << 30)


@either
def file_unreadable(at: Path) -> None:
    """Weights that nobody may read, but root."""
    (at / WEIGHTS).chmod(0)


@wrong
def file_directory(at: Path) -> None:
    """A directory where weights are expected."""
    (at / WEIGHTS).unlink()
    (at / WEIGHTS).mkdir()


@either
def file_directory_record(at: Path) -> None:
    """A directory where the record is expected."""
    (at / RECORD).unlink()
    (at / RECORD).mkdir()


@wrong
def file_config_directory(at: Path) -> None:
    """A directory where the configuration is expected."""
    (at / CONFIG).unlink()
    (at / CONFIG).mkdir()


@wrong
def file_config_pipe(at: Path) -> None:
    """A pipe where the configuration is expected."""
    (at / CONFIG).unlink()
    os.mkfifo(at / CONFIG)


@either
def file_many(at: Path) -> None:
    """Twenty thousand other files beside the adapter's."""
    for i in range(20_000):
        (at / f"{i}").touch()


@either
def name_newline(at: Path) -> None:
    """Names that write lines of a log, are no UTF-8, begin with a dash, or are very long."""
    for name in (b"a\n12:00 served", b"\xff\xfe", b"-rf", b"n" * 200, "\u202e".encode()):
        shutil.copytree(os.fsencode(at), os.fsencode(at.parent) + b"/" + name)


# Records and manifests.


def record(at: Path, **fields: Any) -> None:
    """Change fields of the record."""
    found = json.loads((at / RECORD).read_text())
    (at / RECORD).write_text(json.dumps(found | fields))


@wrong
def record_cycle(at: Path) -> None:
    """An adapter over one that lies over it."""
    other = at.with_name(f"{at.name}-2")
    shutil.copytree(at, other)
    record(at, over=[{"adapter": str(other), "sha256": "0" * 64}])
    record(other, over=[{"adapter": str(at), "sha256": "0" * 64}])


@wrong
def record_itself(at: Path) -> None:
    """An adapter over itself."""
    record(at, over=[{"adapter": str(at), "sha256": "0" * 64}])


@wrong
def record_digest(at: Path) -> None:
    """An adapter over one with another digest."""
    record(at, over=[{"adapter": GOOD, "sha256": "f" * 64}])


@wrong
def record_over_hostile(at: Path) -> None:
    """A good adapter over one whose pattern never ends, by its right digest."""
    below = at.with_name(f"{at.name}-2")
    shutil.copytree(at, below)
    config(below, exclude_modules=SLOW)
    lines = ""
    for name in (CONFIG, WEIGHTS):
        content = (below / name).read_bytes()
        lines += f"{name} {len(content)} {sha256(content).hexdigest()}\n"
    digest = sha256(lines.encode()).hexdigest()
    record(at, over=[{"adapter": str(below), "sha256": digest}])


@wrong
def record_elsewhere(at: Path) -> None:
    """An adapter over files of the machine's."""
    record(at, over=[{"adapter": "../../../../etc", "sha256": "0" * 64}])


@wrong
def record_dots(at: Path) -> None:
    """An adapter over the directory above."""
    record(at, over=[{"adapter": "a/..", "sha256": "0" * 64}])


@wrong
def record_many(at: Path) -> None:
    """An adapter over a hundred thousand others."""
    record(at, over=[{"adapter": GOOD, "sha256": "0" * 64}] * 100_000)


@wrong
def record_deep(at: Path) -> None:
    """A record nested 100,000 deep."""
    (at / RECORD).write_text('{"over":' + "[" * 100_000 + "]" * 100_000 + "}")


@wrong
def record_over_text(at: Path) -> None:
    """A stack that is a text of 4 MB, which an error quotes."""
    record(at, over="x" * (4 << 20))


@wrong
def record_base(at: Path) -> None:
    """A fingerprint of a hundred thousand weights."""
    one = {"shape": [1], "dtype": "float32", "values": "00000000"}
    record(at, base={f"w{i}": one for i in range(100_000)})


@wrong
def manifest_deep(at: Path) -> None:
    """A manifest nested 100,000 deep."""
    (at / "manifest.json").write_text("[" * 100_000)


@wrong
def manifest_huge(at: Path) -> None:
    """A manifest of 300 MB."""
    (at / "manifest.json").touch()
    os.truncate(at / "manifest.json", 300 << 20)


@either
def manifest_strange(at: Path) -> None:
    """A manifest whose names and digests are of other types."""
    entry = {"size": "1", "sha256": []}
    (at / "manifest.json").write_text(json.dumps({"files": {"*": entry, "../x": entry}}))


# Tokenizers and templates.


def own(at: Path, base: Path, **config: Any) -> dict[str, Any]:
    """Give the adapter the base's tokenizer, with other fields of its configuration."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, at / name)
    found = json.loads((at / "tokenizer_config.json").read_text())
    (at / "tokenizer_config.json").write_text(json.dumps(found | config))
    content: dict[str, Any] = json.loads((at / "tokenizer.json").read_text())
    return content


def template(name: str, attacks: str, text: str, told: bool = False) -> None:
    """A case of a chat template.

    Args:
        name: its name.
        attacks: what it attacks.
        text: the template.
        told: whether it has to be told as wrong.
    """

    def alter(at: Path, base: Path) -> None:
        own(at, base)
        (at / "chat_template.jinja").write_text(text)

    CASES[f"tokenizer-template-{name}"] = Case(
        f"tokenizer-template-{name}", attacks, told, alter
    )


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
ENDS = "{% endfor %}{% endfor %}{% endfor %}"
GIGABYTES = {
    "percent": "{{ '%0999999999d' % 1 }}",
    "times": "{{ 'x' * 2000000000 }}",
    "list": "{{ [0] * 2000000000 }}",
    "join": "{{ ('x' * 100000000, ) * 100 | join('y') }}",
    "center": "{{ 'x' | center(1000000000) }}",
    "format": "{{ '{:>2000000000}'.format('x') }}",
    "indent": "{{ ('x\n' * 100000) | indent(100000) }}",
    "replace": "{{ ('x' * 100000) | replace('x', 'x' * 100000) }}",
    "power": "{{ 9 ** 99999999 }}",
    "namespace": "{% set n = namespace(t='x') %}{% for i in range(40) %}{% set n.t = n.t + n.t %}"
    "{% endfor %}{{ n.t }}",
    "batch": "{{ range(99999) | batch(100000000, 0) | list }}",
    "tojson": "{{ ([[0] * 1000] * 100000) | tojson }}",
}
template("loops", "Nested loops that never end.", LOOPS + ENDS)
template(
    "loops-later", "The same, in requests and not in probes.", PROBED + LOOPS + ENDS + "{% endif %}"
)
for name, text in GIGABYTES.items():
    template(name, "A text or a list of gigabytes.", text)
    template(f"{name}-later", "The same, in requests.", PROBED + text + "{% endif %}")


def calls(before: str, arguments: str = "") -> str:
    """A template that writes this before the name of a call and this after it."""
    return (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        + before
        + "{{ c.function.name }}"
        + arguments
        + "{% endfor %}{% endfor %}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
        "{% if add_generation_prompt %}[a]{% endif %}"
    )


ARGUMENTS = " {{ c.function.arguments | tojson }}<end>"
OUT = "{{ cycler.__init__.__globals__.os.system('touch /tmp/hostile-ran') }}"
for name, attacks, text in (
    ("macro", "A macro that calls itself.", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
    ("include", "A template that includes itself.", "{% include 'chat_template' %}"),
    ("import", "A template that imports itself.", "{% import 'chat_template' as t %}{{ t }}"),
    (
        "loop-recursive", "A loop that is called for ever.",
        "{% for a in [0] recursive %}{{ loop([0]) }}{% endfor %}",
    ),
    (
        "parentheses", "Parentheses nested 50,000 deep.",
        "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    ),
    ("blocks", "Blocks nested 3,000 deep.", "{% if 1 %}" * 3000 + "{% endif %}" * 3000),
    ("filters", "A chain of 20,000 filters.", "{{ 'a'" + " | upper" * 20_000 + " }}"),
    ("minus", "A chain of 50,000 signs.", "{{ " + "-" * 50_000 + "1 }}"),
    ("unclosed", "A hundred thousand opened expressions.", "{{" * 100_000),
    ("whitespace", "Spaces that a lexer's patterns try in every way.", "{%" + " " * 100_000 + "-"),
    (
        "escape", "Ways out of a sandbox.",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}" + HELLO,
    ),
    ("globals", "The same by a function's globals.", OUT),
    ("four-megabytes", "A text of four million letters.", "{{ 'x' * 4000000 }}"),
    ("unicode", "Millions of letters outside of ASCII.", "{{ '\U0001f600' * 4000000 }}"),
    ("surrogate", "A text that is no UTF-8.", "{{ '\\ud800' }}" + HELLO),
    ("braces", "A call that begins at every letter.", calls("", "{{ '{' * 300000 }}")),
    ("nested-call", "The same, nested.", calls("", "{{ '{\"a\":' * 10000 }}")),
    ("large-mark", "A mark of a million letters.", calls("{{ ' a' * 500000 }}", ARGUMENTS)),
    ("wide-mark", "A mark of some thousand letters.", calls("{{ ' a' * 5000 }}", ARGUMENTS)),
    ("raises", "An error of 50 MB.", "{{ raise_exception('x' * 50000000) }}"),
    ("refuses", "An error of other letters.", "{{ raise_exception('\\n\\x00\\x1b[31m') }}"),
    ("file", "A template of 100 MB.", "x" * (100 << 20)),
    ("almost", "A template of 7 MB.", "{# " + "x" * (7 << 20) + " #}" + HELLO),
    ("expressions", "A hundred thousand expressions.", "{{ 1 }}" * 100_000),
    ("random", "Another text each time.", "{{ range(99999) | random }}" + HELLO),
):  # fmt: skip
    template(name, attacks, text)


@wrong
def tokenizer_deep(at: Path, base: Path) -> None:
    """A tokenizer.json nested 100,000 deep."""
    own(at, base)
    (at / "tokenizer.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")


@wrong
def tokenizer_config_deep(at: Path, base: Path) -> None:
    """The same for its configuration."""
    own(at, base)
    (at / "tokenizer_config.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")


@either
def tokenizer_split(at: Path, base: Path) -> None:
    """A split by an expression that takes exponential time."""
    content = own(at, base)
    how = {"behavior": "Isolated", "invert": False}
    split = {"type": "Split", "pattern": {"Regex": "((a+)+)+$|(x+x+)+y"}} | how
    both = [split, content["pre_tokenizer"]]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": both}
    (at / "tokenizer.json").write_text(json.dumps(content))


@either
def tokenizer_decoder(at: Path, base: Path) -> None:
    """A decoder that replaces every letter by thousands."""
    content = own(at, base)
    content["decoder"] = {"type": "Replace", "pattern": {"Regex": "."}, "content": "y" * 10_000}
    (at / "tokenizer.json").write_text(json.dumps(content))


@either
def tokenizer_normalizer(at: Path, base: Path) -> None:
    """Normalizers that make a text of one letter one of a billion."""
    content = own(at, base)
    one = {"type": "Replace", "pattern": {"Regex": "."}, "content": "aaaaaaaaaa"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [one] * 9}
    (at / "tokenizer.json").write_text(json.dumps(content))


def words(n: int, size: int = 0) -> Callable[[Path, Path], None]:
    """A tokenizer with n tokens more, of so many letters each."""

    def alter(at: Path, base: Path) -> None:
        content = own(at, base)
        content["added_tokens"] += [
            content["added_tokens"][0]
            | {"id": 300 + i, "content": f"<w{i}>" + "x" * size, "special": i % 2 == 0}
            for i in range(n)
        ]
        (at / "tokenizer.json").write_text(json.dumps(content))

    return alter


@wrong
def tokenizer_million_words(at: Path, base: Path) -> None:
    """A million added tokens."""
    words(MANY)(at, base)


@either
def tokenizer_many_words(at: Path, base: Path) -> None:
    """Thirty thousand added tokens, each of which a server would add to its own."""
    words(30_000)(at, base)


@either
def tokenizer_long_word(at: Path, base: Path) -> None:
    """An added token of 2 MB."""
    words(1, 2 << 20)(at, base)


@wrong
def tokenizer_vocabulary(at: Path, base: Path) -> None:
    """A vocabulary of a million."""
    content = own(at, base)
    content["model"]["vocab"] |= {f"v{i}": 300 + i for i in range(MANY)}
    (at / "tokenizer.json").write_text(json.dumps(content))


@wrong
def tokenizer_numbers(at: Path, base: Path) -> None:
    """A token with a number of billions."""
    content = own(at, base)
    content["model"]["vocab"]["zzz"] = 2**32 - 1
    (at / "tokenizer.json").write_text(json.dumps(content))


@wrong
def tokenizer_renumbered(at: Path, base: Path) -> None:
    """Two tokens of the base that change places."""
    content = own(at, base)
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (at / "tokenizer.json").write_text(json.dumps(content))


@either
def tokenizer_collides(at: Path, base: Path) -> None:
    """Special tokens that are texts of the base's words."""
    content = own(at, base, eos_token="a", pad_token="e", additional_special_tokens=["o", "t"])
    (at / "tokenizer.json").write_text(json.dumps(content))


@either
def tokenizer_code(at: Path, base: Path) -> None:
    """Code of its own."""
    own(at, base, auto_map={"AutoTokenizer": ["code.Own", None]}, tokenizer_class="Own")
    (at / "code.py").write_text("open('/tmp/hostile-ran', 'w')\nclass Own: pass\n")


@either
def tokenizer_classes(at: Path, base: Path) -> None:
    """A class that is none."""
    own(at, base, tokenizer_class={"a": [1]}, model_max_length="x", eos_token={"__type": 3})


@either
def tokenizer_bytes_class(at: Path, base: Path) -> None:
    """A class that needs no vocabulary, or another one."""
    own(at, base, tokenizer_class="ByT5Tokenizer")


@either
def tokenizer_template_list(at: Path, base: Path) -> None:
    """A chat template that is a list of anything."""
    own(at, base, chat_template=[{"name": 3}, 4, {"name": "default", "template": ["x"]}])
    (at / "chat_template.jinja").unlink()


@either
def tokenizer_template_object(at: Path, base: Path) -> None:
    """A chat template that is an object."""
    own(at, base, chat_template={"default": {"a": 1}, "tool_use": None})
    (at / "chat_template.jinja").unlink()


@either
def tokenizer_template_number(at: Path, base: Path) -> None:
    """A chat template that is a number."""
    own(at, base, chat_template=7)
    (at / "chat_template.jinja").unlink()


@either
def tokenizer_templates(at: Path, base: Path) -> None:
    """Five thousand templates."""
    own(at, base)
    (at / "additional_chat_templates").mkdir()
    for i in range(5000):
        (at / "additional_chat_templates" / f"t{i}.jinja").write_text(HELLO)


@either
def tokenizer_manifest(at: Path, base: Path) -> None:
    """A directory of templates that is a link to the machine's."""
    own(at, base)
    (at / "additional_chat_templates").symlink_to("/etc")


@wrong
def tokenizer_large_config(at: Path, base: Path) -> None:
    """A configuration of 200 MB."""
    own(at, base, x="y" * (200 << 20))


@either
def tokenizer_special_map(at: Path, base: Path) -> None:
    """Special tokens of other types, and with texts that are no UTF-8."""
    own(at, base, extra_special_tokens={"a_token": "\ud800", "b_token": "b" * 100_000})


@wrong
def tokenizer_two_gigabytes(at: Path, base: Path) -> None:
    """Twenty sparse vocabularies of 150 MB."""
    own(at, base)
    for i in range(20):
        (at / f"vocab{i}.txt").touch()
        os.truncate(at / f"vocab{i}.txt", 150 << 20)


# Files that change.

MOVING = ("moving-weights", "moving-config", "moving-gone", "moving-pipe")


def moving(folder: Path) -> Callable[[], None]:
    """Adapters whose files change all the time from now on; what is returned ends that."""
    for name in MOVING:
        shutil.copytree(folder / GOOD, folder / name)
        (folder / name / "manifest.json").unlink()
    ended = threading.Event()
    thread = threading.Thread(target=_move, args=(folder, ended), daemon=True)
    thread.start()

    def stop() -> None:
        ended.set()
        thread.join()

    return stop


def _move(folder: Path, ended: threading.Event) -> None:
    for change in _changes(folder):
        change()
        if ended.wait(0.003):
            return


def _changes(folder: Path) -> Iterator[Callable[[], object]]:
    good = {name: (folder / GOOD / name).read_bytes() for name in (CONFIG, WEIGHTS, RECORD)}
    bad = {
        WEIGHTS: good[WEIGHTS][:-200] + b"\xff" * 200,
        CONFIG: good[CONFIG].replace(b'"r": 2', b'"r": 99999999'),
    }
    gone, pipe = folder / "moving-gone", folder / "moving-pipe" / RECORD

    def as_pipe() -> None:
        pipe.unlink()
        os.mkfifo(pipe)

    def as_file() -> None:
        pipe.unlink()
        pipe.write_bytes(good[RECORD])

    while True:
        for name, moved in ((WEIGHTS, "moving-weights"), (CONFIG, "moving-config")):
            for content in (bad[name], good[name]):
                yield lambda at=folder / moved / name, content=content: at.write_bytes(content)
        yield (gone / CONFIG).unlink
        yield lambda: (gone / CONFIG).write_bytes(good[CONFIG])
        yield as_pipe
        yield as_file
