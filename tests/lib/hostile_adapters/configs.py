"""Configurations: what stands in adapter_config.json, or takes its place."""

from __future__ import annotations

from pathlib import Path

from hostile_adapters.case import CONFIG, MANY, config, either, wrong


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
