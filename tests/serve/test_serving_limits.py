"""Limits of a key: its expiry, the base, tokens; and who may read the metrics."""

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import lorafold as lf
from conftest import lorafold, make_tokenizer
from lorafold.errors import LorafoldError
from lorafold.serving.keys import (
    DAY_SECONDS,
    HINT,
    Caller,
    KeyFile,
    Keys,
    TokenLimits,
    TokenUsage,
    new_key,
    parse_expiry,
)
from lorafold.serving.refusals import Refusal
from lorafold.serving.settings import read
from serving_cases import ADMIN, Running, running, saved
from serving_cases import until as true

pytest_plugins = ["serving_fixtures"]
SCRAPE = "a key for scraping of enough letters"


@pytest.fixture(scope="module")
def server(serve, tmp_path_factory: pytest.TempPathFactory) -> Running:
    scrape = tmp_path_factory.mktemp("limits") / "scrape"
    scrape.write_text(SCRAPE)
    return serve(keys={"acme": ["*"]}, metrics_key=scrape)


def made(server: Running, tenant: str, **more: object) -> str:
    file = server.parts.settings.keys
    assert file is not None
    return new_key(file, tenant, ["*"], **more)


def complete(server: Running, key: str, model: str = "a", n: int = 3) -> Any:
    body = {"model": model, "prompt": "The", "max_tokens": n, "ignore_eos": True}
    return server.ask("/v1/completions", body, key)


def test_one_key_scrapes_and_another_administers(server: Running) -> None:
    assert server.ask("/metrics", key=SCRAPE).status == 200
    assert server.ask("/metrics", key=ADMIN).status == 200
    assert server.ask("/metrics", headers={"x-api-key": SCRAPE}).status == 200
    for key in (None, server.keys["acme"], SCRAPE[1:]):
        assert server.ask("/metrics", key=key).code == "invalid_api_key"
    for path, body in (
        ("/admin/adapters", None), ("/v1/models", None), ("/v1/load_lora_adapter", {}),
        ("/v1/completions", {"model": "a", "prompt": "x"}), ("/tokenize", {"prompt": "x"}),
    ):  # fmt: skip
        assert server.ask(path, body, SCRAPE).code == "invalid_api_key"


def test_the_metrics_are_open_only_where_nothing_closes_them(tmp_path: Path) -> None:
    (tmp_path / "scrape").write_text(SCRAPE)
    keys = tmp_path / "keys.json"
    new_key(keys, "acme", ["*"])
    Keys(None, None).check_metrics(None)
    with pytest.raises(Refusal, match="without --metrics-key-file"):
        Keys(keys, None).check_metrics(None)
    for file in (None, keys):
        with pytest.raises(Refusal, match="no valid key for metrics"):
            Keys(file, None, tmp_path / "scrape").check_metrics("Bearer x")
        Keys(file, None, tmp_path / "scrape").check_metrics(f"Bearer {SCRAPE}")
    with pytest.raises(LorafoldError, match="expected another key"):
        Keys(None, tmp_path / "scrape", tmp_path / "scrape")


def test_a_key_expires(server: Running) -> None:
    now = datetime.now(UTC)
    gone = made(server, "gone", expires=now + timedelta(seconds=0.3))
    assert complete(server, gone).status == 200
    true(lambda: complete(server, gone).status == 401)
    assert complete(server, gone).code == "expired_api_key"
    yesterday = made(server, "gone", expires=str(now.date() - timedelta(days=1)))
    today = made(server, "gone", expires=str(now.date()))
    assert server.ask("/v1/models", key=yesterday).code == "expired_api_key"
    if datetime.now(UTC).date() == now.date():
        assert server.ask("/v1/models", key=today).status == 200
    assert server.ask("/v1/models", key=server.keys["acme"]).status == 200


def test_how_long_a_key_holds_is_read() -> None:
    now = datetime.now(UTC)
    assert timedelta(days=29.9) < parse_expiry("30d") - now < timedelta(days=30.1)
    assert timedelta(hours=11.9) < parse_expiry("12h") - now < timedelta(hours=12.1)
    assert parse_expiry("2999-12-31") == datetime(3000, 1, 1, tzinfo=UTC)
    for text in ("", "0d", "30", "d", "1w", "2020-01-01", "2999-13-01", "-5d", "30d ", "99999999d"):
        with pytest.raises(LorafoldError, match="--expires: found"):
            parse_expiry(text)


def test_a_key_without_the_base_knows_no_base(server: Running) -> None:
    base, key = server.parts.registry.base, made(server, "nobase", base=False)
    assert [m["id"] for m in server.ask("/v1/models", key=key).json["data"]] == ["a"]
    assert complete(server, key).status == 200
    answers = [complete(server, key, name) for name in (base, "x" * len(base))]
    assert [(a.status, a.code) for a in answers] == [(404, "model_not_found")] * 2
    assert answers[0].content.replace(base.encode(), b"x" * len(base)) == answers[1].content
    assert server.ask(f"/v1/models/{base}", key=key).code == "model_not_found"
    assert server.ask("/tokenize", {"prompt": "x"}, key).code == "missing_parameter"
    assert server.ask("/tokenize", {"prompt": "x", "model": "a"}, key).status == 200
    assert complete(server, server.keys["acme"], base).status == 200


@pytest.mark.parametrize("period", ["minute", "day"])
def test_a_tenant_gets_so_many_tokens(server: Running, period: str) -> None:
    tenant = f"small-{period}"
    key = made(server, tenant, limits={f"tokens_per_{period}": 10})
    free = made(server, tenant)
    at = datetime.now(UTC)
    answer = complete(server, key, n=9)
    usage = answer.json["usage"]
    assert usage["total_tokens"] >= 10
    refused = [
        complete(server, key),
        server.ask("/v1/chat/completions", {"model": "a", "messages": []}, key),
        server.ask("/v1/responses", b"not even read", key),
    ]
    if f"{datetime.now(UTC):%d %H:%M}" != f"{at:%d %H:%M}":
        pytest.skip("a minute began meanwhile")
    for one in refused:
        assert (one.status, one.code) == (429, f"token_limit_{period}"), one.content
        seconds = int(one.headers["retry-after"])
        now = datetime.now(UTC)
        today = DAY_SECONDS - (now.timestamp() % DAY_SECONDS)
        left = 60 - now.second if period == "minute" else today
        assert abs(seconds - left) <= 3
    assert str(usage["total_tokens"]) in refused[0].json["error"]["message"]
    assert complete(server, free).status == 200  # a key of the same tenant without a limit
    assert complete(server, server.keys["acme"]).status == 200


def test_counts_survive_a_restart(llama: Path, tmp_path: Path) -> None:
    model, folder = llama, tmp_path / "adapters"
    saved(model, {"a": lf.LoRA(rank=2)}, folder)
    with running(model, folder, {"acme": ["*"]}) as server:
        complete(server, server.keys["acme"])
        kept = server.parts.registry.file.with_name("state-tokens.json")
    assert not kept.exists()  # no key has a limit
    file, limits = tmp_path / "adapters-files" / "keys.json", {"tokens_per_day": 12}
    key = new_key(file, "day", ["*"], limits=limits)
    with running(model, folder, {"acme": ["*"]}) as server:
        stream = {"model": "a", "prompt": "The", "max_tokens": 20, "stream": True}
        assert server.ask("/tokenize", {"model": "a", "prompt": "The"}, key).status == 200
        answer = server.ask("/v1/completions", stream | {"ignore_eos": True}, key)
        assert answer.status == 200
        before = complete(server, key)
        true(kept.exists)  # while it runs, too
        assert complete(server, server.keys["acme"]).status == 200
    found = json.loads(kept.read_text())["tenants"]
    assert found["day"]["day"]["tokens"] == 2 * len(make_tokenizer()("The").input_ids) + 20
    assert "acme" in found
    with running(model, folder, {"acme": ["*"]}) as server:
        after = complete(server, key)
    assert (before.code, after.code) == ("token_limit_day", "token_limit_day")
    kept.write_text("{")
    told = pytest.raises(LorafoldError, match=r"state-tokens.json: .*fix or move the file")
    with told, running(model, folder, {"acme": ["*"]}):
        pass


def test_counts_begin_anew_with_the_time(tmp_path: Path) -> None:
    now = [86400.0 * 20000 + 30]
    spent = TokenUsage(tmp_path / "spent.json", lambda: True, lambda: now[0])
    caller = Caller("t", limits=TokenLimits(tokens_per_minute=10, tokens_per_day=25))
    spent.check(caller)

    def refused() -> tuple[str, int | None]:
        with pytest.raises(Refusal) as found:
            spent.check(caller)
        return found.value.code, found.value.retry_after

    spent.add("t", 10)
    spent.add("other", 100)
    assert refused() == ("token_limit_minute", 30)
    now[0] += 29.5
    assert refused() == ("token_limit_minute", 1)
    now[0] += 0.5
    spent.check(caller)
    spent.add("t", 15)
    assert refused() == ("token_limit_day", DAY_SECONDS - 60)
    asyncio.run(spent.save())
    again = TokenUsage(tmp_path / "spent.json", lambda: True, lambda: now[0])
    with pytest.raises(Refusal, match="25 tokens were used in this UTC day, and the key's limit"):
        again.check(caller)
    now[0] += DAY_SECONDS
    again.check(caller)
    again.add("t", 1)
    asyncio.run(again.save())
    assert list(json.loads((tmp_path / "spent.json").read_text())["tenants"]) == ["t"]


def test_counts_that_cannot_be_kept_are_told_once(tmp_path: Path, caplog: Any) -> None:
    spent = TokenUsage(tmp_path / "nowhere" / "spent.json", lambda: True)
    (tmp_path / "nowhere").write_text("a file")
    for _ in range(3):
        spent.add("t", 1)
        asyncio.run(spent.save())
    assert caplog.text.count("the tenants' token counts can't be saved") == 1


def test_old_files_of_keys_stay_readable_and_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    old = {"tenant": "old", "adapters": ["a-*"], "sha256": "0" * 64}
    file.write_text(json.dumps({"keys": [old]}))
    done = lorafold(
        "serve", "new-key", "new", "--keys", str(file), "--expires", "30d", "--no-base",
        "--tokens-per-minute", "100", "--tokens-per-day", "1000",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = json.loads(file.read_text())["keys"]
    assert first == old
    assert second["base"] is False
    assert second["limits"] == {"tokens_per_minute": 100, "tokens_per_day": 1000}
    caller = Keys(file, None).caller(f"Bearer {done.stdout.strip()}")
    assert (caller.base, caller.limits.tokens_per_day) == (False, 1000)
    assert read(file, KeyFile, HINT).keys[1].expires == datetime.fromisoformat(second["expires"])
    plain = lorafold("serve", "new-key", "plain", "--keys", str(file))
    assert plain.returncode == 0
    assert json.loads(file.read_text())["keys"][2].keys() == old.keys()
    wrong = lorafold("serve", "new-key", "x", "--keys", str(file), "--expires", "soon")
    assert wrong.returncode == 2
    assert re.search(r"--expires: found 'soon', expected", wrong.stderr)
    file.write_text(json.dumps({"keys": [old | {"expires": "2026-12-31T10:00:00"}]}))
    with pytest.raises(LorafoldError, match=r"keys.0.expires: .*timezone"):
        read(file, KeyFile, HINT)
