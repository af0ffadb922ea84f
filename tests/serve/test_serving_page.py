"""The page at `/`, in a browser: on a desktop and a phone, in light and in dark."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import playwright.sync_api as sync
import pytest

from browser_cases import CONTRASTS, faults, listen
from engine_cases import METHODS
from lorafold.serving.registry import AliasTarget
from serving_cases import Running, running, saved

pytest_plugins = ["browser_cases", "serving_fixtures"]
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 740}
LOOKS = [(DESKTOP, "light"), (DESKTOP, "dark"), (PHONE, "light"), (PHONE, "dark")]
IDS = ["desktop-light", "desktop-dark", "phone-light", "phone-dark"]
EVIL = "<img src=x onerror=\"document.title='taken'\">"
INSPECTED = "<style>h1 { color: rgb(1, 2, 3) }</style><h1>Inside</h1><script>h1.remove()</script>"


@pytest.fixture(scope="module")
def adapters(llama: Path, tmp_path_factory: Any) -> Path:
    specs = {name: METHODS[name] for name in ("dora", "lora")}
    folder = saved(llama, specs, tmp_path_factory.mktemp("page") / "adapters")
    (folder / "lora.html").write_text(INSPECTED)
    return folder


@pytest.fixture(scope="module")
def site(llama: Path, adapters: Path, often: None) -> Iterator[Running]:
    with running(llama, adapters) as server:
        server.parts.registry.set_alias("newest", (AliasTarget(adapter="lora"),))
        yield server


@pytest.fixture
def visit(browser: Any, site: Running) -> Iterator[Callable[..., Any]]:
    """Open the page, and fail on what it should not write or ask for."""
    contexts: list[Any] = []
    told: list[str] = []

    def opened(query: str = "", url: str = site.url, viewport: Any = DESKTOP, **how: Any) -> Any:
        contexts.append(browser.new_context(viewport=viewport, **how))
        page = contexts[-1].new_page()
        listen(page, url, told)
        page.goto(f"{url}/{query}")
        page.wait_for_selector("#door:not([hidden]), #chat:not([hidden])")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults(told) == []


def ask(page: Any, question: str, length: int = 24) -> list[str]:
    if not page.locator("#length").is_visible():
        page.click("#options summary")
    page.fill("#length", str(length))
    page.fill("#question", question)
    page.press("#question", "Enter")
    return answered(page)


def answered(page: Any) -> list[str]:
    """The texts of the last two answers, once they are complete."""
    sync.expect(page.locator("#send")).to_be_enabled(timeout=30_000)
    assert page.locator(".answer[aria-busy=true]").count() == 0
    return page.locator("li:last-child .said").evaluate_all("all => all.map(p => p.textContent)")


def completion(site: Running, model: str, *messages: str, length: int = 24) -> str:
    """The API's own answer to a conversation of user and assistant in turns."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
    body = {"model": model, "messages": turns, "temperature": 0, "max_tokens": length}
    return site.ask("/v1/chat/completions", body).json["choices"][0]["message"]["content"]


@pytest.mark.slow
@pytest.mark.few(1)
def test_both_answers_are_those_of_the_api_and_each_side_goes_on_from_its_own(visit, site) -> None:
    page, base = visit(), site.parts.registry.base
    assert page.locator("#left").input_value() == base
    assert page.locator("#right").input_value() == "dora"
    first = ask(page, "Book a table")
    assert first == [completion(site, name, "Book a table") for name in (base, "dora")]
    assert first[0] != first[1]
    second = ask(page, "for four\nplease")
    assert second == [
        completion(site, name, "Book a table", text, "for four\nplease")
        for name, text in zip((base, "dora"), first, strict=True)
    ]
    for numbers in page.locator(".numbers").all_text_contents():
        assert numbers.startswith("24 tokens · ")
        assert "tokens/s · first token after " in numbers
        assert numbers.endswith("(length)")
    spoken = page.locator("#said p").all_text_contents()
    assert sorted(spoken) == sorted([f"{n} has answered: 24 tokens" for n in (base, "dora")])

    page.click("#renew")
    assert page.locator(".answer").count() == 0
    assert ask(page, "Book a table") == first


def test_a_system_message_and_the_choice_of_models_count(visit: Any, site: Running) -> None:
    page = visit("?left=newest&right=lora")
    page.click("#options summary")
    page.fill("#system", "Be brief.")
    with page.expect_request("**/v1/chat/completions") as asked:
        one, other = ask(page, "Hello")
    assert one == other
    body = asked.value.post_data_json
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    page.select_option("#right", "dora")
    assert page.url == f"{site.url}/?left=newest&right=dora"
    labels = page.locator("#left optgroup").evaluate_all("all => all.map(g => g.label)")
    assert labels == ["Base", "Adapters", "Aliases"]
    page.fill("#temperature", "7")
    page.click("#options summary")
    page.fill("#question", "Hello?")
    page.press("#question", "Enter")  # refused by the browser, which shows the field
    sync.expect(page.locator("#temperature")).to_be_visible()
    assert page.locator(".answer").count() == 2


def test_stop_ends_both_answers_here_and_in_the_server(visit, site, monkeypatch) -> None:
    engine = site.engine
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.05) or step())
    for press in ("#stop", "Escape"):
        page = visit()
        page.fill("#question", "Tell a story")
        page.click("#send")
        sync.expect(page.locator(".said").first).not_to_be_empty()
        sync.expect(page.locator(".said").last).not_to_be_empty()
        assert page.locator(".answer[aria-busy=true]").count() == 2
        assert page.locator("#send").is_disabled()
        page.keyboard.press(press) if press == "Escape" else page.click(press)
        texts = answered(page)
        assert all(texts)
        for numbers in page.locator(".numbers").all_text_contents():
            assert numbers.endswith("stopped")
        assert page.evaluate("document.activeElement.id") == "question"
        until = time.monotonic() + 5
        while not site.idle():
            assert time.monotonic() < until
            time.sleep(0.05)


def test_the_table_has_every_model_and_follows_it_without_losing_the_focus(
    visit: Any, site: Running, caplog: Any
) -> None:
    caplog.set_level("INFO", "lorafold")
    page = visit("?left=lora&right=lora")
    rows, base = page.locator("#rows tr"), site.parts.registry.base
    sync.expect(rows).to_have_count(4)
    texts = [row.inner_text().split("\t") for row in rows.all()]
    assert [row[0] for row in texts] == [base, "dora", "lora", "newest"]
    assert [row[3] for row in texts] == ["base", "resident", "resident", "alias of lora"]
    assert [row[1:3] for row in texts] == [["–", "–"], ["dora", "3"], ["lora", "4"], ["–", "–"]]
    assert texts[2][8].endswith("kB")
    row = rows.nth(2)
    before = int(row.locator("td").nth(5).inner_text().replace(",", ""))
    row.locator("a").focus()
    page.evaluate("document.activeElement.closest('tr').dataset.mine = 'yes'")
    completion(site, "lora", "Hello")
    sync.expect(row.locator("td").nth(5)).to_have_text(f"{before + 24:,}")
    assert row.locator("td").nth(6).inner_text().endswith(" ms")
    assert page.evaluate("document.activeElement.closest('tr').dataset.mine") == "yes"

    site.parts.registry.quarantine("lora", "the test put it there")
    sync.expect(row.locator(".state")).to_have_text("quarantined")
    site.parts.registry.unload("dora")
    sync.expect(rows).to_have_count(3)
    for name in ("dora", "lora"):
        site.parts.registry.load(name)
    sync.expect(rows).to_have_count(4)
    assert "path=/v1/chat/completions" in caplog.text
    assert "path=/v1/models" not in caplog.text  # it is listened to all the time


def test_what_is_refused_is_told_as_text(visit: Any) -> None:
    page = visit(f"?{urlencode({'right': EVIL})}")
    assert page.locator("#right").input_value() == EVIL
    ask(page, EVIL)
    assert page.locator(".question .text").text_content() == EVIL
    assert page.locator(".answer h3").last.text_content() == EVIL
    told = page.locator(".answer .error").last.text_content()
    assert f"{EVIL!r} is not served" in told
    assert told.endswith("(model_not_found)")
    ask(page, "long " * 600)
    assert "(context_length_exceeded)" in page.locator("li:last-child .error").first.text_content()
    assert page.locator("main img").count() == 0
    assert page.title() == "lorafold"


def test_what_a_model_writes_is_text_however_it_arrives(visit: Any) -> None:
    """The streams of another server: its reasoning, an error half way, and one that breaks off."""

    def event(**delta: str) -> str:
        return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\r\n\r\n"

    said = ": a comment\n\n" + event(reasoning_content="Hm <b>") + event(content=EVIL)
    error = f"data: {json.dumps({'error': {'message': EVIL, 'code': 'total_timeout'}})}\n\n"
    page = visit()
    bodies = iter([said + error, said, said + "data: [DONE]\n\n", said + "data: [DONE]\n\n"])
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=next(bodies), content_type="text/event-stream"),
    )
    assert ask(page, "Hello") == [EVIL, EVIL]
    one, other = page.locator(".answer .error").all_text_contents()
    assert {one, other} == {
        f"{EVIL} (total_timeout)",
        "The connection to the server was lost: the stream ended early",
    }
    assert page.locator(".reasoning .text").all_text_contents() == ["Hm <b>"] * 2
    assert ask(page, "Hello again") == [EVIL, EVIL]
    assert page.locator("main img").count() == 0
    assert page.title() == "lorafold"


@pytest.mark.few(2)
@pytest.mark.parametrize(("viewport", "scheme"), LOOKS, ids=IDS)
def test_it_can_be_read_and_nothing_is_wider_than_the_screen(
    viewport: Any, scheme: str, visit: Any
) -> None:
    page = visit(f"?right={'w' * 200}", viewport=viewport, color_scheme=scheme)
    ask(page, "w" * 300)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    boxes = [page.locator(".answer").nth(i).bounding_box() for i in (0, 1)]
    beside = boxes[0]["y"] == boxes[1]["y"]
    assert beside == (viewport is DESKTOP)
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 40
    assert {text: ratio for text, ratio in contrasts.items() if ratio < 4.5} == {}


@pytest.mark.slow
def test_the_keyboard_is_enough_and_everything_has_a_name(visit: Any) -> None:
    page = visit()
    sync.expect(page.locator("#rows tr")).to_have_count(4)
    names = []
    for _ in range(40):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", names
        if names[-1] == "question":
            break
    assert {"left", "right", "conversation"} < set(names)
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("you")
    page.keyboard.press("Enter")
    answered(page)
    assert page.locator(".question .text").text_content() == "Hello\nyou"
    assert page.evaluate("document.activeElement.id") == "question"

    assert page.locator("h1").count() == page.locator("main").count() == 1
    assert page.locator("html").get_attribute("lang") == "en"
    unnamed = """() => [...document.querySelectorAll("input, textarea, select")]
      .filter((e) => e.type !== "hidden" && !e.labels.length).map((e) => e.id)"""
    assert page.evaluate(unnamed) == []


@pytest.mark.slow
def test_a_key_is_asked_for_kept_in_the_tab_and_forgotten(visit, llama, adapters) -> None:
    with running(llama, adapters, {"acme": ["lora"]}) as server:
        page, key = visit(url=server.url), server.keys["acme"]
        field, chat = page.get_by_label("Key", exact=True), page.locator("#chat")
        sync.expect(field).to_be_focused()
        assert field.get_attribute("type") == "password"
        assert chat.is_hidden()
        field.fill("lf-wrong")
        page.keyboard.press("Enter")
        sync.expect(page.locator("#key-wrong")).to_have_text("The server does not accept this key.")
        field.fill(f" {key} ")
        page.keyboard.press("Enter")
        sync.expect(chat).to_be_visible()
        assert page.locator("#rows th").all_text_contents()[1:] == ["lora"]
        assert all(ask(page, "Hello"))
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        assert key not in page.content()

        with page.context.expect_page() as opened:
            page.get_by_role("link", name="inspect lora").click()
        assert key not in opened.value.url
        see_inspected(opened.value)
        page.reload()
        sync.expect(chat).to_be_visible()
        page.get_by_role("button", name="Forget key").click()
        sync.expect(field).to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0


def test_the_inspected_page_opens_as_it_is_and_shut(visit: Any) -> None:
    page = visit()
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="inspect lora").click()
    see_inspected(opened.value)


def see_inspected(page: Any) -> None:
    heading = page.locator("h1")
    sync.expect(heading).to_have_text("Inside")
    sync.expect(heading).to_have_css("color", "rgb(1, 2, 3)")
    assert page.evaluate("[self.origin, window.opener]") == ["null", None]


@pytest.mark.slow
def test_a_server_that_is_gone_is_told_and_waited_for(visit, site, llama, adapters) -> None:
    with running(llama, adapters) as server:
        page = visit(url=server.url)
        trouble = page.locator("#trouble")
        sync.expect(page.locator("#rows tr")).to_have_count(4)
        sync.expect(trouble).to_be_empty()
        server.parts.host.draining = True
        sync.expect(trouble).to_contain_text("not ready: the server is shutting down")
        server.parts.host.draining = False
        sync.expect(trouble).to_be_empty()
    sync.expect(trouble).to_contain_text("does not answer")
    ask(page, "Hello")
    for told in page.locator(".answer .error").all_text_contents():
        assert told.startswith("The connection to the server was lost")
    with running(llama, adapters, port=server.port):
        sync.expect(trouble).to_be_empty()
        assert ask(page, "Hello")[0] == completion(site, site.parts.registry.base, "Hello")
