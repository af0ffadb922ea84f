"""`lorafold lab inspect`, `resize` and `extract` as commands, attention heads, and models without a
tokenizer.
"""

import json
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import lorafold as lf
from adapter_cases import make_adapter
from command_cases import printed, rows_file, words
from conftest import lorafold, refused
from fresh_models import fresh_model
from lorafold.cli import app
from lorafold.errors import LorafoldError, NoTokenizer
from lorafold.inspecting import spectra
from lorafold.inspecting.inspect import inspect
from lorafold.inspecting.residual_stream import Heads, find_stream, heads_in
from lorafold.inspecting.summary import intruder_sentence
from lorafold.inspecting.updates import Svd, svd_of_dense
from lorafold.models.tokenizer import load_tokenizer
from lorafold.peft.adapter_directory import open_all
from lorafold.resolve import Base
from own_caches import shared
from update_cases import orthonormal

KEYS = {
    "rank", "effective_rank_90", "effective_rank_95", "effective_rank_99", "stable_rank",
    "relative_norm", "amplification",
}  # fmt: skip
TWO = [{"text": "Book a table for four"}, {"text": "Remind me to call"}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAFOLD_CACHE", str(shared(tmp_path / "cache")))


def numbers(value) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [n for part in value for n in numbers(part)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_everything_at_once(tiny_model_dir, tmp_path):
    base, few = tiny_model_dir("llama"), ["q_proj", "down_proj"]  # each kind has ten drawings
    make_adapter(base, tmp_path / "a", spec=lf.LoRA(rank=4), targets=few)
    make_adapter(base, tmp_path / "b", spec=lf.LoRA(rank=2), targets=few, seed=1)
    save_file({"probe": torch.randn(32)}, tmp_path / "f.safetensors")
    data = rows_file(tmp_path / "d.jsonl", TWO)
    given = {"model": base, "against": tmp_path / "b", "data": data, "full": True}
    own = {"directions": tmp_path / "f.safetensors", "html": tmp_path / "page.html"}
    found = printed("inspect", tmp_path / "a", **given, **own)
    assert len(found["sites"]) == 4
    assert all(site.keys() >= KEYS for site in found["sites"].values())
    assert all(site["rank"] == 4 for site in found["sites"].values())
    assert [t for t, _ in found["paths"]["scaling"]] == [i / 4 for i in range(-2, 7)]
    assert len(found["paths"]["between"]) == 11
    assert set(found["against"]["sites"]) == set(found["sites"])
    grids = [of["phi_read"] for of in found["against"]["kinds"].values()]
    assert {(len(grid), len(grid[0])) for grid in grids} == {(4, 2)}
    assert {of["side"] for of in found["layers"].values()} == {"read", "written"}
    site = found["sites"]["model.layers.0.self_attn.q_proj"]
    assert site["reads_shares"].keys() == {"probe"}
    assert len(site["position_read"]) == 11
    assert sum(site["position_read"]) == pytest.approx(1, abs=1e-3)
    page = (tmp_path / "page.html").read_text()
    # needs nothing beside itself
    assert not re.search(r"<(script|link|iframe|img)\b|url\((?!#)|@import|(src|href)=\"http", page)
    assert all(sentence.split(",")[0][:40] in unescape(page) for sentence in found["advice"])


@pytest.mark.slow
def test_the_page_shows_no_figure_that_the_json_lacks(tiny_model_dir, tmp_path):
    base = tiny_model_dir("llama")
    make_adapter(base, tmp_path / "a")
    found = printed("inspect", tmp_path / "a", model=base, full=True, html=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    maps = {
        "effective_rank_95": ".0f", "relative_norm": ".1%", "amplification": ".2f",
        "intruders": ".0f",
    }  # fmt: skip
    tables = re.findall(r'<table class="map">.*?</table>', page, re.DOTALL)
    for table, (name, form) in zip(tables, maps.items(), strict=True):
        shown = re.findall(r"<td style=[^>]*>([^<]*)</td>", table)
        assert sorted(shown) == sorted(f"{site[name]:{form}}" for site in found["sites"].values())
    sites = found["sites"].values()
    named = [site.get(verb, []) for site in sites for verb in ("reads", "writes")]
    cosines = {f"{n:+.2f}" for n in numbers(named)}
    assert set(re.findall(r"</code> ([+-][\d.]+)", page)) == cosines


def test_without_full_no_spectrum_of_the_base_is_made(tiny_model_dir, tmp_path):
    make_adapter(tiny_model_dir("llama"), tmp_path / "a")
    found = inspect(Base(tiny_model_dir("llama")), open_all([tmp_path / "a"]))
    assert not any("intruders" in site for site in found.as_json()["sites"].values())
    assert not (tmp_path / "cache" / "svd").exists()


@pytest.mark.parametrize(
    "spec",
    [lf.LoHa(rank=2), lf.DoRA(), lf.VeRA(rank=8), lf.IA3(), lf.FishMask()],
    ids=lambda s: type(s).__name__,
)
def test_any_method_that_folds(spec, tiny_model_dir, tmp_path):
    base = tiny_model_dir("llama")
    make_adapter(base, tmp_path / "a", spec=spec)
    found = inspect(Base(base), open_all([tmp_path / "a"]))
    for site in found.sites.values():
        assert site.base.amplification > 0
        assert site.rank >= site.effective_rank_99 >= 1


def test_a_head_and_an_embedding_speak_in_tokens(tiny_model_dir, tmp_path):
    base = tiny_model_dir("llama")
    make_adapter(base, tmp_path / "a", targets=["embed_tokens", "lm_head"], bias="none")
    sites = inspect(Base(base), open_all([tmp_path / "a"])).as_json()["sites"]
    verbs = {path: site.keys() & {"reads", "writes"} for path, site in sites.items()}
    assert verbs == {key: {"reads", "writes"} for key in ("model.embed_tokens", "lm_head")}


def test_what_lies_beside_is_counted_and_an_untrained_adapter_is_said_to_be_one(
    tiny_model, tiny_model_dir, tmp_path
):
    base = tiny_model_dir("qwen2")
    how = {"bias": "lora_only", "modules_to_save": ["model.norm"]}
    lf.attach(tiny_model("qwen2"), lf.LoRA(rank=2), **how).save(tmp_path / "a")
    found = printed("inspect", tmp_path / "a", model=base, html=tmp_path / "page.html")
    assert found["beside"] == {"BiasDelta": 6, "ReplaceDelta": 1}
    assert found["advice"] == ["The update is zero everywhere: this adapter changes nothing."]
    assert found["whole"]["norm"] == 0


def test_positions_and_intruders_of_planted_updates():
    u, v = orthonormal(40, 30).float(), orthonormal(30, 30, 1).float()
    base = Svd(u, torch.linspace(5, 0.5, 30), v)
    w = base.dense()
    inside = Svd(base.u[:, [3, 25]], torch.tensor([2.0, 1.0]), base.v[:, [3, 25]])
    count, found = spectra.in_base_spectrum(w, inside, 2)
    planted = [0, 0.8, 0, 0, 0, 0, 0, 0, 0.2, 0, 0]
    assert found.position_written == pytest.approx(planted, abs=1e-3)
    assert found.position_read == pytest.approx(found.position_written, abs=1e-3)
    assert count == 0
    assert found.top_projection == pytest.approx(float(base.s[:2].norm()), rel=1e-4)
    more = torch.randn(40, 10, generator=torch.Generator().manual_seed(2))
    whole = torch.linalg.qr(torch.cat([base.u, more], 1))[0]
    # written where the base writes nothing
    outside = Svd(whole[:, 30:32], torch.tensor([20.0, 10.0]), base.v[:, [0, 1]])
    count, found = spectra.in_base_spectrum(w, outside, 2)
    assert found.position_written[-1] == pytest.approx(1, abs=1e-3)
    assert count == 2
    weak = Svd(outside.u, torch.tensor([0.1, 0.05]), outside.v)
    assert spectra.intruders(svd_of_dense(w), w, weak) == 0
    assert f"in all): top {spectra.NUM_TOP} singular vectors" in intruder_sentence([count])


def test_the_base_s_svd_is_kept_by_the_matrix(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAFOLD_CACHE", str(tmp_path))
    w = torch.randn(12, 8)
    first = spectra.cached_svd(w)
    monkeypatch.setattr(spectra, "svd_of_dense", None)
    again = spectra.cached_svd(w.clone())
    assert torch.allclose(again.dense(), w, atol=1e-2)
    assert torch.equal(again.s, first.s)


def test_errors_are_one_line(tiny_model, tiny_model_dir, tmp_path):
    base, source = tiny_model_dir("llama"), Base(tiny_model_dir("llama"))
    make_adapter(base, tmp_path / "prefix", spec=lf.Prefix(tokens=2))
    with pytest.raises(LorafoldError, match="has no singular values"):
        inspect(source, open_all([tmp_path / "prefix"]))
    with pytest.raises(LorafoldError, match="expected the directory of an adapter"):
        inspect(source, open_all([tmp_path]))
    make_adapter(base, tmp_path / "a")
    other = fresh_model(base)
    for p in other.parameters():
        p.data += 1
    other.save_pretrained(tmp_path / "other")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "other" / file).write_bytes((base / file).read_bytes())
    with pytest.raises(LorafoldError, match="the adapter was trained on another base"):
        inspect(Base(tmp_path / "other"), open_all([tmp_path / "a"]))
    other = Base(tmp_path / "other", allow_other_base=True)
    assert inspect(other, open_all([tmp_path / "a"])).sites
    given = words("resize", tmp_path / "a", model=base, out=tmp_path / "o")
    assert "found neither, expected exactly one" in refused(*given)
    assert "above 0 and at most 1" in refused(*given, "--energy", "1.5")


def test_resize_and_extract_as_commands(tiny_model_dir, tmp_path):
    base = tiny_model_dir("llama")
    make_adapter(base, tmp_path / "a")
    data = rows_file(tmp_path / "d.jsonl", TWO)
    given = {"rank": 4, "data": data, "storage": "fp32"}
    found = printed("resize", tmp_path / "a", out=tmp_path / "b", model=base, **given)
    assert found["error"] < 1e-6
    assert found["loss_after"] == pytest.approx(found["loss_before"], rel=1e-5)
    merging = {"adapter": tmp_path / "a", "out": tmp_path / "m", "no_certificate": True}
    printed("merge", model=base, **merging)
    extracted = printed("extract", model=base, tuned=tmp_path / "m", rank=4, out=tmp_path / "x")
    assert extracted["error"] < 1e-3


def test_resize_names_the_keys_that_it_ignores(tiny_model_dir, tmp_path):
    base = tiny_model_dir("llama")
    make_adapter(base, tmp_path / "a")
    data = rows_file(tmp_path / "d.jsonl", [TWO[0] | {"id": 1}])
    given = {"rank": 2, "model": base, "storage": "fp32", "data": data, "out": tmp_path / "b"}
    done = lorafold(*words("resize", tmp_path / "a", **given))
    assert done.returncode == 0, done.stderr
    assert f"{data}: ignored keys: id (rows of {{text}})\n" in done.stderr


ATTENTION = "model.layers.1.self_attn"


def planted(model_dir: Path, out: Path, where: dict[str, tuple[int, int]]) -> None:
    """An adapter whose update of a module lies in some rows, or columns for o_proj, alone."""
    model = lf.load_model(model_dir, "fp32")
    adapter = lf.attach(model, lf.LoRA(rank=2), "all-linear")
    with torch.no_grad():
        for path, (first, last) in where.items():
            delta = adapter.deltas[path]
            down, up = (p for _, p in delta.named_parameters())
            up.normal_()
            side = down.T if path.endswith("o_proj") else up  # (features, r)
            mask = torch.zeros(len(side), 1)
            mask[first:last] = 1
            side.mul_(mask)
    adapter.save(out)


def test_planted_heads_are_found_and_shown(tiny_model_dir, tmp_path) -> None:
    model_dir, out, page = tiny_model_dir("llama"), tmp_path / "planted", tmp_path / "page.html"
    config = lf.load_model(model_dir, "fp32").config
    size, queries, keys = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    planted(model_dir, out, {
        f"{ATTENTION}.q_proj": (size, 2 * size),
        f"{ATTENTION}.v_proj": (0, size),
        f"{ATTENTION}.o_proj": ((queries - 1) * size, queries * size),
    })  # fmt: skip
    told = lorafold("inspect", str(out), "--model", str(model_dir), "--json", "--html", str(page))
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    heads = {path: site["heads"] for path, site in found["sites"].items() if "heads" in site}
    assert {path.rpartition(".")[2] for path in heads} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    last = queries - 1
    for name, at, n in (("q_proj", 1, queries), ("v_proj", 0, keys), ("o_proj", last, queries)):
        wanted = [float(head == at) for head in range(n)]
        assert heads[f"{ATTENTION}.{name}"] == pytest.approx(wanted, abs=1e-6)
    assert heads["model.layers.0.self_attn.q_proj"] == [0.0] * queries
    [said] = [line for line in found["advice"] if "stands out most" in line]
    assert "100%" in said
    assert "Attention heads" in page.read_text()
    assert "heads_left_out" not in found


def test_shares_are_those_of_the_dense_update() -> None:
    torch.manual_seed(0)
    dw = torch.randn(12, 20)
    whole = float(dw.norm() ** 2)
    rows = [float(dw[n * 4 : n * 4 + 4].norm() ** 2) / whole for n in range(3)]
    columns = [float(dw[:, n * 5 : n * 5 + 5].norm() ** 2) / whole for n in range(4)]
    assert Heads(3, 4, True).shares(svd_of_dense(dw)) == pytest.approx(rows, rel=1e-5)
    assert Heads(4, 5, False).shares(svd_of_dense(dw)) == pytest.approx(columns, rel=1e-5)


def test_a_fused_projection_is_said_to_be_left_out(tiny_model_dir, tmp_path) -> None:
    model_dir, out = tiny_model_dir("gpt2"), tmp_path / "fused"
    model = lf.load_model(model_dir, "fp32")
    found, fused = heads_in(model, find_stream(model))
    assert {path.rpartition(".")[2] for path in fused} == {"c_attn"}
    assert {path.rpartition("h.")[2].partition(".")[2] for path in found} == {"attn.c_proj"}
    lf.attach(model, lf.LoRA(rank=2), "all-linear").save(out)
    left = lf.inspect(out, model_dir).heads_left_out
    assert left is not None
    assert left.startswith("Fused projections of queries, keys and values")


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def without(base: Path, out: Path, *names: str) -> Path:
    shutil.copytree(base, out, ignore=lambda _, found: [name for name in found if name in names])
    return out


# transformers makes an empty tokenizer of the one and fails with the other
@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("names", [TOKENIZER, TOKENIZER[:1]], ids=["no file", "no vocabulary"])
def test_the_tables_of_tokens_are_left_out(
    kind: str, names: tuple[str, ...], tiny_model_dir, tmp_path: Path
) -> None:
    base = without(tiny_model_dir(kind), tmp_path / "base", *names)
    make_adapter(base, tmp_path / "a")
    save_file({"probe": torch.ones(32)}, tmp_path / "f.safetensors")
    own = {"directions": tmp_path / "f.safetensors", "html": tmp_path / "page.html"}
    arguments = words("inspect", tmp_path / "a", model=base, **own)
    asked = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    found: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    line = (
        f"The nearest tokens are left out: model {base}: found no tokenizer, expected a file"
        " with its vocabulary."
    )
    assert found["tokens_left_out"] == line
    assert line in asked.stderr.splitlines()
    assert f"<h2>Tokens read and written</h2><p>{line}</p>" in (tmp_path / "page.html").read_text()
    assert not any(verb in site for site in found["sites"].values() for verb in ("reads", "writes"))
    # all else is there, the user's own vectors too, as with the tokenizer
    assert any("reads_vectors" in site for site in found["sites"].values())
    whole = inspect(Base(tiny_model_dir(kind)), open_all([tmp_path / "a"])).as_json()
    assert whole["tokens_left_out"] is None
    assert whole["whole"] == found["whole"]
    assert any("reads" in site for site in whole["sites"].values())
    printed = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert line in printed.stderr.splitlines()
    assert "On average, a single module needs" in printed.stdout


def test_an_adapter_s_own_tokenizer_names_them(tiny_model_dir, tmp_path: Path) -> None:
    base = without(tiny_model_dir("llama"), tmp_path / "base", *TOKENIZER)
    make_adapter(base, tmp_path / "a")
    load_tokenizer(tiny_model_dir("llama")).save_pretrained(tmp_path / "a")
    found = inspect(Base(base), open_all([tmp_path / "a"])).as_json()
    assert found["tokens_left_out"] is None
    assert any("reads" in site for site in found["sites"].values())


def test_a_tokenizer_that_cannot_be_read_is_still_an_error(tiny_model_dir, tmp_path: Path) -> None:
    base = without(tiny_model_dir("llama"), tmp_path / "base")
    make_adapter(base, tmp_path / "a")
    (base / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(LorafoldError, match="loading in transformers failed") as error:
        inspect(Base(base), open_all([tmp_path / "a"]))
    assert not isinstance(error.value, NoTokenizer)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma", "qwen2"])
def test_no_command_takes_an_empty_tokenizer_for_the_model_s(
    kind: str, tiny_model_dir, tmp_path: Path
) -> None:
    base = without(tiny_model_dir(kind), tmp_path / "base", *TOKENIZER)
    with pytest.raises(NoTokenizer, match="found no tokenizer"):
        load_tokenizer(base)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Book", "completion": "a table"}\n')
    for command in (["generate", "--prompt", "Book"], ["eval", "--data", str(rows)]):
        with pytest.raises(NoTokenizer, match="found no tokenizer"):
            CliRunner().invoke(app, [*command, "--model", str(base)], catch_exceptions=False)
