"""The page at `/`, in a browser: Markdown of hostile models, differences of answers, a table of ten
thousand models, and administration.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import playwright.sync_api as sync
import pytest

from browser_cases import faults, listen
from engine_cases import METHODS
from serving_cases import ADMIN, Running, running, saved

pytest_plugins = ["browser_cases", "serving_fixtures"]
MARKDOWN = """# Title

Some **strong**, *leaning* and `<b>code</b>`; snake_case_name, 2 * 3 * 4.
See [the docs](https://example.org/a?b=c) and ![a picture](https://example.org/x.png).

1. one
   - inner **two**

   ```python
   x = "<i>"
   ```
2. three

> quoted

---
"""
HOSTILE = """<script>document.title='taken'</script>
<img src=x onerror="document.title='taken'"> <svg/onload=alert(1)> <iframe src=//example.org>

[a](javascript:document.title='taken') [b](data:text/html,x) ![c](//example.org/x.png) <https://e.org>
[d](https://example.org/"onclick="document.title='taken') [e](https://example.org/<img>)

| <b> | <style>*{display:none}</style> |
```html" onload=alert(1)
</code></pre><script>document.title='taken'</script>
"""
CHATS = "**/v1/chat/completions"
ALLOWED = "h4 h5 h6 p strong em code a ol ul li blockquote hr figure figcaption span button pre"
LONG = [
    part * 9000 for part in ("`a", "[", "> ", "**a", "_a ", "- ", "![](https://", "*a ", "```",
                             "[a](https://a", "* *", "1. ", "#", "# ", "~~~\n", "> - 1. ")
] + ["#" + " " * 20000 + "x", "-" + " " * 20000 + "x"]  # fmt: skip


@pytest.fixture(scope="module")
def site(llama: Path, tmp_path_factory: Any, often: None) -> Iterator[Running]:
    specs = {name: METHODS[name] for name in ("dora", "lora")}
    folder = saved(llama, specs, tmp_path_factory.mktemp("many") / "adapters")
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text("{")
    with running(llama, folder) as server:
        assert server.parts.registry.watcher.settled(30)
        yield server


@pytest.fixture
def page(browser: Any, site: Running) -> Iterator[Any]:
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    found, told = context.new_page(), list[str]()
    listen(found, site.url, told)
    found.goto(site.url)
    found.wait_for_selector("#chat:not([hidden])")
    yield found
    context.close()
    assert faults(told) == []


def say(page: Any, *answers: str) -> Any:
    """Let the models answer so; the last turn."""

    def stream(text: str) -> str:
        chunks = ({"choices": [{"index": 0, "delta": {"content": text}}]}, {"choices": []})
        return "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n"

    bodies = iter(stream(text) for text in answers)
    kind = "text/event-stream"
    page.route(CHATS, lambda route: route.fulfill(body=next(bodies), content_type=kind))
    page.fill("#question", "Hello")
    page.press("#question", "Enter")
    sync.expect(page.locator("#send")).to_be_enabled(timeout=30_000)
    page.unroute(CHATS)
    return page.locator("#turns > li").last


@pytest.mark.slow
def test_markdown_is_shown_and_code_can_be_copied(page: Any) -> None:
    answer = say(page, MARKDOWN, MARKDOWN).locator(".formatted").first
    assert answer.locator("h4").text_content() == "Title"
    assert answer.locator("strong").all_text_contents() == ["strong", "two"]
    assert answer.locator("em").all_text_contents() == ["leaning"]
    assert answer.locator("code").all_text_contents() == ["<b>code</b>", 'x = "<i>"']
    assert answer.locator(":scope > ol > li").count() == 2
    assert answer.locator("ol > li > ul > li").all_text_contents() == ["inner two"]
    assert answer.locator("blockquote").text_content() == "quoted"
    assert "snake_case_name, 2 * 3 * 4." in answer.text_content()
    links = answer.locator("a")
    assert links.all_text_contents() == ["https://example.org/a?b=c", "https://example.org/x.png"]
    told = "([a]) => [a.href, a.rel, a.target, a.parentElement.textContent]"
    href, rel, target, text = links.evaluate_all(told)
    assert (href, rel, target) == ("https://example.org/a?b=c", "noopener noreferrer", "_blank")
    assert "See the docs (https://example.org/a?b=c)" in text
    answer.get_by_role("button", name="Copy").click()
    sync.expect(answer.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == 'x = "<i>"'

    page.uncheck("#markdown")
    said = page.locator(".said").first
    sync.expect(said).to_be_visible()
    assert said.text_content() == MARKDOWN
    assert not answer.is_visible()


def test_hostile_markdown_becomes_text_and_takes_a_moment(page: Any) -> None:
    answer = say(page, HOSTILE, HOSTILE).locator(".formatted").first
    names = answer.evaluate("e => [...e.querySelectorAll('*')].map((x) => x.localName)")
    assert set(names) <= set(ALLOWED.split())
    attributes = answer.evaluate("""e => [...e.querySelectorAll('*')].flatMap(
        (x) => x.getAttributeNames().map((n) => `${x.localName} ${n}`))""")
    allowed = {"a href", "a target", "a rel", "figure class", "span class", "button type",
               "pre tabindex", "ol start"}  # fmt: skip
    assert set(attributes) <= allowed
    hrefs = answer.locator("a").evaluate_all("all => all.map((a) => [a.protocol, a.textContent])")
    assert hrefs == [["https:", 'https://example.org/"onclick="document.title=\'taken\'']]
    for text in ("<script>", "[a](javascript:document.title='taken')", "<style>", "<https://e.org>"):
        assert text in answer.text_content()
    assert page.title() == "lorafold"
    script = """async (texts) => {
      const { Formatted } = await import("/markdown.js");
      const began = performance.now();
      for (const text of texts) new Formatted(document.createElement("div")).show(text);
      return performance.now() - began;
    }"""
    assert page.evaluate(script, LONG) < 5000


def test_formatted_text_that_grows_is_what_it_is_at_once(page: Any) -> None:
    script = """async (text) => {
      const { Formatted } = await import("/markdown.js");
      const [grown, once] = [0, 0].map(() => document.createElement("div"));
      const growing = new Formatted(grown);
      for (let n = 0; n <= text.length; n++) growing.show(text.slice(0, n));
      new Formatted(once).show(text);
      return grown.innerHTML === once.innerHTML && once.children.length === 5;
    }"""
    assert page.evaluate(script, MARKDOWN)


def test_differences_are_marked_word_by_word(page: Any) -> None:
    left, right = "The quick brown fox\njumps <b>.", "The slow brown fox\nreally jumps <b>!"
    turn = say(page, left, right)
    box = turn.locator(".compared")
    assert box.locator("summary").text_content() == "5 differences"
    assert not box.locator(".text").is_visible()
    box.locator("summary").click()
    assert box.locator("del").all_text_contents() == ["quick", "."]
    added = [text.strip() for text in box.locator("ins").all_text_contents()]
    assert added == ["slow", "really", "!"]
    kept = "all => all.filter((e) => e.localName !== %r).map((e) => e.textContent).join('')"
    parts = box.locator(".text > *")
    assert parts.evaluate_all(kept % "ins") == left
    assert parts.evaluate_all(kept % "del") == right
    same = say(page, left, left).locator("summary").last
    assert same.text_content() == "Both answers are the same"
    assert say(page, left, right).locator(".compared").evaluate("e => e.open")  # as before

    told = """async ([a, b]) => (await import("/difference.js")).differences(a, b)"""
    pairs = (("", "a b"), ("a b", ""), ("a b a b", "b a b a"), ("x y z", "x z"), ("ä 中文", "中文"))
    for a, b in pairs:
        found = page.evaluate(told, [a, b])
        assert "".join(text for kind, text in found if kind != "right") == a
        assert "".join(text for kind, text in found if kind != "left") == b
    assert page.evaluate(told, ["a " * 9000, "b " * 9000]) is None


def models(n: int) -> list[dict[str, Any]]:
    """A base and n adapters, every tenth of which is resident, and one is wrong."""
    told = [{"id": "base", "parent": None, "state": "resident"}]
    for i in range(n):
        state = "resident" if i % 10 == 0 else "cold"
        told.append({"id": f"a-{i:05d}", "parent": "base", "state": state, "digest": "0" * 64,
                     "tokens": i, "rank": 4, "method": "lora"})  # fmt: skip
    evil = {"id": "evil", "parent": "base", "state": "wrong", "why": HOSTILE}
    return [*told, evil]


@pytest.mark.slow
def test_ten_thousand_models_are_searched_filtered_and_sorted(page: Any) -> None:
    event = {"object": "list", "data": models(10_000), "status": "", "administrator": True}
    later = {"object": "changes", "data": [], "removed": ["a-00001"]}
    bodies = iter(["".join(f"data: {json.dumps(one)}\n\n" for one in (event, later))])
    quiet = ": nothing new\n\n"
    page.route("**/v1/models/events", lambda route: route.fulfill(body=next(bodies, quiet)))
    began = time.monotonic()
    page.reload()
    shown, rows = page.locator("#shown"), page.locator("#rows tr")
    sync.expect(shown).to_have_text("1–50 of 10,001")
    assert time.monotonic() - began < 10
    assert rows.count() == 50
    names = page.locator("#rows th")
    assert names.all_text_contents()[:3] == ["base", "a-00000", "a-00002"]
    page.click("#on")
    sync.expect(shown).to_have_text("51–100 of 10,001")
    page.click("#back")
    assert page.locator("#back").is_disabled()

    page.select_option("#states", "resident")
    sync.expect(shown).to_have_text("1–50 of 1,000")
    assert page.locator("#states option:checked").text_content() == "resident (1,000)"
    page.fill("#search", "A-0999")
    assert names.all_text_contents() == ["a-09990"]
    page.select_option("#states", "")
    sync.expect(shown).to_have_text("1–10 of 10")
    page.get_by_role("button", name="Tokens").click()
    assert names.all_text_contents()[:2] == ["a-09999", "a-09998"]
    tokens = page.locator("th", has=page.get_by_role("button", name="Tokens"))
    assert tokens.get_attribute("aria-sort") == "descending"
    page.get_by_role("button", name="Tokens").click()
    assert names.all_text_contents()[0] == "a-09990"
    page.fill("#search", "nothing like it")
    sync.expect(shown).to_have_text("no matching models")

    page.fill("#search", "")
    page.select_option("#states", "wrong")
    assert page.locator(".why").text_content() == HOSTILE
    page.get_by_role("button", name="manage evil").click()
    assert page.locator("#manage-why").text_content() == HOSTILE
    assert page.title() == "lorafold"
    page.keyboard.press("Escape")
    sync.expect(page.locator("#manage")).to_be_hidden()
    page.fill("#search", "a-00002")
    page.select_option("#states", "")
    page.get_by_role("button", name="ask a-00002").click()
    assert page.locator("#right").input_value() == "a-00002"
    sync.expect(page.locator("#trouble")).to_contain_text("The server closed the connection")


@pytest.mark.slow
@pytest.mark.few(1)
def test_an_administrator_changes_adapters_and_aliases(page: Any, site: Running) -> None:
    registry, rows = site.parts.registry, page.locator("#rows tr")
    sync.expect(rows).to_have_count(3)
    assert page.get_by_role("button", name="manage").count() == 0
    assert not page.locator("#new-alias").is_visible()
    page.click("#administer")
    sync.expect(page.get_by_label("Key", exact=True)).to_be_focused()
    page.keyboard.type("another key of letters")
    page.keyboard.press("Enter")
    sync.expect(page.locator("#key-wrong")).to_contain_text("found no valid administrator key")
    page.fill("#key", ADMIN)
    page.keyboard.press("Enter")
    sync.expect(rows).to_have_count(4)
    broken = rows.filter(has_text="broken")
    assert broken.locator(".state").text_content() == "wrong"
    assert "adapter_config.json" in broken.locator(".why").text_content()

    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="manage broken").click()
    dialog = page.get_by_role("dialog")
    assert dialog.get_by_role("button", name="Unload").is_disabled()
    dialog.get_by_role("button", name="Load again").click()
    sync.expect(page.locator("#manage-wrong")).to_contain_text("adapter_config.json")
    dialog.get_by_role("button", name="Close").click()

    state = rows.filter(has_text="lora").last.locator(".state")
    page.get_by_role("button", name="manage lora").click()
    for name, now in (
        ("Pin", "resident, pinned"), ("Unpin", "resident"), ("Quarantine", "quarantined"),
        ("Load again", "resident"), ("Unload", "unloaded"), ("Load again", "resident"),
    ):  # fmt: skip
        dialog.get_by_role("button", name=name, exact=True).click()
        sync.expect(state).to_have_text(now)
        sync.expect(page.locator("#manage-state")).to_contain_text(now)
    assert registry.adapters.keys() == {"dora", "lora"}
    page.keyboard.press("Escape")

    page.click("#new-alias")
    dialog.get_by_label("Alias").fill("best")
    page.click("#more-targets")
    for i, (name, weight) in enumerate((("lora", "9"), ("dora", "1"))):
        dialog.get_by_label("Adapter").nth(i).fill(name)
        dialog.get_by_label("Weight").nth(i).fill(weight)
    page.keyboard.press("Enter")
    best = rows.filter(has_text="best")
    sync.expect(best.locator(".state")).to_have_text("alias of lora (90%), dora (10%)")
    assert [t.weight for t in registry.state.aliases["best"].targets] == [9, 1]
    page.get_by_role("button", name="manage best").click()
    dialog.get_by_role("button", name="Remove").last.click()
    dialog.get_by_role("button", name="Save alias").click()
    sync.expect(best.locator(".state")).to_have_text("alias of lora")
    page.get_by_role("button", name="manage best").click()
    dialog.get_by_role("button", name="Roll back").click()
    sync.expect(best.locator(".state")).to_have_text("alias of lora (90%), dora (10%)")
    page.get_by_role("button", name="manage best").click()
    dialog.get_by_role("button", name="Delete alias").click()
    sync.expect(best).to_have_count(0)
    unnamed = """() => [...document.querySelectorAll("input, textarea, select, button")]
      .filter((e) => e.type !== "hidden" && !e.textContent.trim() && !e.labels?.length
        && !e.ariaLabel).map((e) => e.outerHTML)"""
    assert page.evaluate(unnamed) == []


def test_what_is_not_seen_holds_no_stream_and_what_ends_is_asked_for_again(page, site) -> None:
    seen = "Object.defineProperty(document, 'visibilityState', {value: %r, configurable: true});" \
        "document.dispatchEvent(new Event('visibilitychange'))"  # fmt: skip
    sync.expect(page.locator("#rows tr")).to_have_count(3)
    with page.expect_event("requestfailed") as left:
        page.evaluate(seen % "hidden")
    assert left.value.url.endswith("/v1/models/events")
    site.parts.registry.pin("dora", True)
    time.sleep(1.2)
    states = page.locator("#rows .state")
    assert not any("pinned" in text for text in states.all_text_contents())
    page.evaluate(seen % "visible")
    sync.expect(page.locator("#rows tr").nth(1).locator(".state")).to_have_text("resident, pinned")
    sync.expect(page.locator("#trouble")).to_be_empty()
    site.parts.registry.pin("dora", False)
    sync.expect(page.locator("#rows tr").nth(1).locator(".state")).to_have_text("resident")
