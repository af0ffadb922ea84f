"""The pages that the program writes, in a browser: nothing is cut, covered or wider than the
screen, and all of it can be read.
"""

import json
import re
import sys
import warnings
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len

import lorafold as lf
from adapter_cases import make_adapter
from browser_cases import CONTRASTS, CUT
from conftest import lorafold, refused
from conversation_cases import ROWS
from lorafold.files.plots import SERIES, brief, distinct, drawing, folded, number, scaled, short
from lorafold.inspecting.inspect import describe_method
from page_cases import CHINESE, LONG, PAGES

WIDTHS, SCHEMES = (1280, 390), ("light", "dark")

pytest_plugins = ["browser_cases"]


def see(browser: Any, file: Path) -> None:
    """All that has to be so of a page, however it is looked at."""
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda one: asked.append(one.url))
    page.goto(file.as_uri())
    page.locator("details").evaluate_all("all => all.forEach((one) => { one.open = true })")
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CUT) == []
    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme)
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 3
        assert {text: ratio for text, ratio in contrasts.items() if ratio < 4.5} == {}
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert page.locator("figure").count() == page.locator("figure > figcaption + svg").count()
    page.close()


SLOW = {"all methods": pytest.mark.slow}


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW.get(n, ())) for n in PAGES])
def test_a_report_can_be_read_everywhere(name: str, browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    PAGES[name](file)
    see(browser, file)


def test_an_update_can_be_read_everywhere(tiny_model_dir, browser, tmp_path) -> None:
    base, file = tiny_model_dir("llama"), tmp_path / "page.html"
    make_adapter(base, tmp_path / "a", spec=lf.LoRA(rank=4), targets=["q_proj", "down_proj"])
    done = lorafold("inspect", str(tmp_path / "a"), "--model", str(base), "--html", str(file))
    assert done.returncode == 0, done.stderr
    see(browser, file)


def test_rows_and_a_run_on_them_can_be_read_everywhere(tiny_model_dir, browser, tmp_path) -> None:
    file, data = tmp_path / "page.html", tmp_path / "rows.jsonl"
    data.write_text(json.dumps(ROWS["both"]))
    run = ["train", "--model", str(tiny_model_dir("llama")), "--data", str(data), "--out",
           str(tmp_path / "a"), "--chat-template", "tools"]  # fmt: skip
    assert lorafold(*run, "--preview", "--html", str(file)).returncode == 0
    see(browser, file)
    line = refused(*run, "--preview", "--plot", str(file))
    assert "--plot: can't be combined with --preview" in line
    assert not (tmp_path / "a").exists()

    done = lorafold(*run, "--steps", "2", "--storage", "fp32", "--json", "--plot", str(file))
    assert done.returncode == 0, done.stderr
    first, last = json.loads(done.stdout)["losses"]
    assert f"From {first:.4g} to {last:.4g}." in file.read_text()
    see(browser, file)


# what is seen without red, green or blue cones: Machado, Oliveira and Fernandes 2009, table 1
SEEN = {
    "all": np.eye(3),
    "no red": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no green": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "no blue": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
# of linear red, green and blue to those of cones, and of their cube roots to Oklab's axes
CONES = [[0.412, 0.536, 0.051], [0.212, 0.681, 0.107], [0.088, 0.282, 0.630]]
OKLAB = [[0.210, 0.794, -0.004], [1.978, -2.429, 0.451], [0.026, 0.783, -0.809]]


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_series_are_told_apart_by_who_sees_fewer_colours(scheme: str, seen: str) -> None:
    style = (files("lorafold.files") / "page.css").read_text(encoding="utf-8")
    pairs = re.findall(r"--series-.: light-dark\(#(.{6}), #(.{6})\);", style)
    of = [bytes.fromhex(pair[SCHEMES.index(scheme)]) for pair in pairs]
    share = np.array([[*one] for one in of]) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    shown = np.clip(linear @ np.transpose(SEEN[seen]), 0, 1)
    at = np.cbrt(shown @ np.transpose(CONES)) @ np.transpose(OKLAB)
    apart = [float(np.linalg.norm(a - b)) for a, b in combinations(at, 2)]
    assert len(at) == len(SERIES) == 5
    assert min(apart) > 0.1  # those of two colours that are just told apart are at 0.02


@pytest.mark.parametrize(("value", "text"), [
    (2.7, "2.7"), (0.05, "0.05"), (1e-6, "0.000001"), (1.94e-7, "1.94e−7"), (0.1 + 0.2, "0.3"),
    (-0.5, "−0.5"), (0, "0"), (-1e-15, "0"), (40_000, "40k"), (1_500_000, "1.5M"), (2e9, "2B"),
    (999, "999"),
])  # fmt: skip
def test_a_number_is_plain(value: float, text: str) -> None:
    assert number(value) == text


def width(name: str) -> int:
    """In halves of a Chinese character, as a terminal has it."""
    return cell_len(name.replace("\u200b", ""))


@pytest.mark.parametrize("name", [CHINESE, LONG, f"{CHINESE[:8]} {LONG}", "보상 함수 " * 4, "a"])
@pytest.mark.parametrize("most", [5, 11, 24])
def test_a_name_has_the_room_that_it_takes(name: str, most: int) -> None:
    cut = short(name, most)
    assert min(width(name), most) - 2 <= width(cut) <= most
    assert short(cut, most) == cut
    lines = folded(name, 2).split("\n")
    assert len(lines) <= 2
    assert max(map(width, lines)) <= 16 + 1  # where a line ends with half of a character


def test_a_plot_has_its_names_as_they_are_and_warns_of_no_font() -> None:
    def draw(axes: Any) -> None:
        axes.set_xticks([0], [short(CHINESE[:6], 24)])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert f">{CHINESE[:6]}</text>" in drawing(draw, "title", "said")


def test_names_are_as_long_as_tells_them_apart() -> None:
    names = [f"lora rank=4 lr={rate} dropout=0.05" for rate in ("0.001", "0.0001", "0.002")]
    shown = distinct(names, 16)
    assert len({*shown}) == 3
    assert max(map(len, shown)) <= len(names[1])
    assert distinct(["lora", "lora", "dora"], 4) == ["lora", "lora", "dora"]


def test_names_lose_what_all_of_them_have() -> None:
    assert brief([f"file_of_rewards.py:a{n}_of_answers" for n in (1, 10)]) == ["…a1…", "…a10…"]
    assert brief(["a word", "a verb"]) == ["a word", "a verb"]
    assert brief([LONG, f"{LONG} {LONG}"]) == [LONG, f"{LONG} {LONG}"]
    assert brief([f"{CHINESE}, 1", f"{CHINESE}, 2"]) == ["…1", "…2"]


@pytest.mark.parametrize("low", [1e-6, 0.003, 2.7, 4e4])
@pytest.mark.parametrize("times", [1.02, 1.6, 9.0, 70.0, 1e4])
def test_a_logarithmic_axis_has_plain_numbers(low: float, times: float) -> None:
    def draw(axes: Any) -> None:
        axes.plot([1, 2], [low, low * times])
        scaled(axes, x="linear", y="log")

    texts = re.findall(r"<text [^>]*>([^<]+)</text>", drawing(draw, "title", "said"))
    across = {number(1 + n / 5) for n in range(6)}
    shown = [text for text in texts if text not in across]
    assert len(shown) >= 2
    assert all(re.fullmatch(r"[0-9.]+[kM]?", text) for text in shown), shown


def test_a_page_without_matplotlib_has_all_but_its_plots(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    made = drawing(lambda axes: None, "Loss", "It fell.")
    assert "<svg" not in made
    assert "Loss</b> It fell. To see this plot, install lorafold[plots]." in made


def test_an_inspection_describes_the_method_in_words() -> None:
    over = lf.LoRA(rank=4, alpha=8, dropout=0.1)
    assert describe_method(lf.DoRA(over)) == "DoRA, over LoRA, rank 4, alpha 8, dropout 0.1"
    assert describe_method(lf.LoRA(rank=8)).startswith("LoRA, rank 8")
