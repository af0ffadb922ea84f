"""Configurations: what stands in adapter_config.json, or takes its place."""

from __future__ import annotations

from pathlib import Path

from hostile_adapters.case import CONFIG, MANY, cases, config, raw, wrong

ZEROS = "0" * 4000


def content(at: Path, of: bytes) -> None:
    (at / CONFIG).write_bytes(of)


cases("config", {
    "deep": (
        "JSON nested 100,000 deep ends a parser's stack.",
        lambda at: content(at, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    ),
    "deep-objects": (
        "Objects nested 900 deep end the stack of whoever walks them.",
        lambda at: raw(at, '"bias"', '"x": ' + '{"a":' * 900 + "1" + "}" * 900 + ', "bias"'),
    ),
    "million-keys": (
        "A million unknown keys, for each of which there is something to say.",
        lambda at: config(at, **{f"k{i}": 1 for i in range(MANY)}),
    ),
    "many-keys": (
        "Fewer unknown keys, as many as pass a limit.",
        lambda at: config(at, **{f"k{i}": 1 for i in range(60_000)}),
    ),
    "nan": ("An alpha that is no number.", lambda at: config(at, lora_alpha=float("nan"))),
    "overflow": (
        "An alpha that a parser reads as infinity.",
        lambda at: raw(at, '"lora_alpha": 4', '"lora_alpha": 1e999'),
    ),
    "huge-rank": ("A rank that would make factors of terabytes.", lambda at: config(at, r=10**9)),
    "large-rank": (
        "A rank that would make factors of some gigabytes, which a machine may have.",
        lambda at: config(at, r=10**6),
    ),
    "rank-pattern-huge": (
        "The same by a pattern, of one module.",
        lambda at: config(at, rank_pattern={"q_proj": 10**9}),
    ),
    "negative-rank": ("A negative rank.", lambda at: config(at, r=-1)),
    "no-rank": ("A rank of nothing, by which alpha is divided.", lambda at: config(at, r=0)),
    "digits": (
        "A number of 5,000 digits, which takes quadratic time to read.",
        lambda at: raw(at, '"r": 2', '"r": 1' + "0" * 5000),
    ),
    "fewer-digits": (
        "A number of 4,000 digits, which Python reads and nothing else can hold.",
        lambda at: raw(at, '"lora_alpha": 4', f'"lora_alpha": 1{ZEROS}'),
    ),
    "rank-digits": ("A rank of 4,000 digits.", lambda at: raw(at, '"r": 2', f'"r": 1{ZEROS}')),
    "layer-digits": (
        "The number of a layer, of 4,000 digits.",
        lambda at: raw(at, '"bias"', f'"layers_to_transform": [1{ZEROS}], "bias"'),
    ),
    "duplicates": (
        "A key that is there twice, of which parsers read one or the other.",
        lambda at: raw(at, '"r": 2', '"r": 2, "r": 3'),
    ),
    "bom": (
        "A byte-order mark before JSON.",
        lambda at: content(at, b"\xef\xbb\xbf" + (at / CONFIG).read_bytes()),
    ),
    "not-utf8": (
        "Bytes that are no UTF-8.",
        lambda at: content(at, (at / CONFIG).read_bytes().replace(b"CAUSAL_LM", b"\xff\xfe\xc0")),
    ),
    "utf16": (
        "UTF-16, which parsers of JSON detect.",
        lambda at: content(at, (at / CONFIG).read_text().encode("utf-16")),
    ),
    "nul": ("Nothing but NUL.", lambda at: content(at, bytes(1000))),
    "list": ("A list where an object is expected.", lambda at: content(at, b"[]")),
    "surrogate-key": (
        "A text that can't be written as UTF-8, in an unknown key, which an error names.",
        lambda at: raw(at, '"bias"', '"\\ud800": 1, "bias"'),
    ),
    "long-type": (
        "A method of 4 MB, which an error quotes.", lambda at: config(at, peft_type="x" * (4 << 20))
    ),
    "type-list": (
        "A method that can't be looked up in a table.",
        lambda at: config(at, peft_type=[{"a": {}}]),
    ),
})  # fmt: skip
cases("config", {
    "minus-overflow": (
        "An alpha that overflows in fp32.",
        lambda at: raw(at, '"lora_alpha": 4', '"lora_alpha": -1e308'),
    ),
    "large-alpha": (
        "An alpha that makes logits infinite at run time.", lambda at: config(at, lora_alpha=1e38)
    ),
    "surrogate": (
        "A text that can't be written as UTF-8, wherever it is told or kept.",
        lambda at: config(at, base_model_name_or_path="\ud800"),
    ),
    "long-base": (
        "The name of a base of 4 MB, which lists of models show.",
        lambda at: config(at, base_model_name_or_path="x" * (4 << 20)),
    ),
    "dora-switch": (
        "Switches that are lists.",
        lambda at: config(at, task_type=["SEQ_CLS"], inference_mode={"a": 1}),
    ),
}, told=False)  # fmt: skip


@wrong
def config_huge(at: Path) -> None:
    """A file of 300 MB."""
    with (at / CONFIG).open("wb") as file:
        file.write(b'{"a": "')
        file.truncate(300 << 20)
