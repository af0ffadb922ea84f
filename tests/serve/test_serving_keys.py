"""Access: tenants and their adapters, the administrator, and nobody else."""

import hmac
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest

import lorafold as lf
from conftest import lorafold
from lorafold.errors import LorafoldError
from lorafold.serving.directory import Directory
from lorafold.serving.keys import HINT, KeyFile, Keys, new_key
from lorafold.serving.refusals import Refusal
from lorafold.serving.settings import read
from serving_cases import ADMIN, Running, no_descriptors, running, saved

pytest_plugins = ["serving_fixtures"]
ATTACKS = [
    "../acme-a", "..", "/etc/passwd", "%2e%2e%2facme-a", "acme-a\0", "acme-a/../beta-a", ".hidden",
    "ACME-A", "‥/acme-a", "․․", "a" * 10000, "acme-a@", "acme-a@../../etc", "", " acme-a",
]  # fmt: skip


@pytest.fixture(scope="module")
def server(serve) -> Running:
    """Two tenants with an adapter each, and one that both may use."""
    specs = {name: lf.LoRA(rank=2) for name in ("acme-a", "beta-a", "shared")}
    return serve(specs, {"acme": ["acme-*", "shared"], "beta": ["beta-*", "shared"]})


def asked(model: str) -> dict[str, object]:
    return {"model": model, "prompt": "The", "max_tokens": 2}


def test_a_tenant_sees_and_uses_its_own(server: Running):
    base = server.parts.registry.base
    for tenant, other in (("acme", "beta"), ("beta", "acme")):
        key = server.keys[tenant]
        listed = [m["id"] for m in server.ask("/v1/models", key=key).json["data"]]
        assert listed == [base, f"{tenant}-a", "shared"]
        for model in listed:
            assert server.ask("/v1/completions", asked(model), key).status == 200
        theirs = server.ask("/v1/completions", asked(f"{other}-a"), key)
        unknown = server.ask("/v1/completions", asked(f"{other}-x"), key)
        assert theirs.status == unknown.status == 404
        assert theirs.content == unknown.content.replace(b"-x'", b"-a'")
        assert server.ask(f"/v1/models/{other}-a", key=key).status == 404


def test_without_a_valid_key_nothing_is_told(server: Running):
    named = [*server.parts.registry.adapters, "acme"]
    for path, body in (
        ("/v1/models", None), ("/v1/completions", asked("acme-a")), ("/metrics", None),
        ("/v1/chat/completions", {}), ("/v1/responses", {}), ("/tokenize", {}), ("/detokenize", {}),
        ("/v1/adapters/acme-a/page", None), ("/admin/adapters", None),
        ("/v1/load_lora_adapter", {"lora_name": "acme-a"}),
    ):  # fmt: skip
        for key in (None, "wrong", "lf-" + "x" * 43, server.keys["acme"][:-1], ""):
            answer = server.ask(path, body, key)
            assert answer.status == 401, (path, key, answer.content)
            assert not any(name in answer.content.decode() for name in named)
            assert answer.headers["www-authenticate"] == "Bearer"


def test_a_tenants_key_opens_no_administration(server: Running):
    key = server.keys["acme"]
    for method, path, body in (
        ("GET", "/admin/adapters", None),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "acme-a"}),
        ("POST", "/v1/unload_lora_adapter", {"lora_name": "beta-a"}),
        ("POST", "/admin/adapters/beta-a:quarantine", {}),
        ("PUT", "/admin/aliases/x", {"target": "beta-a"}),
        ("DELETE", "/admin/aliases/x", None),
        ("GET", "/metrics", None),
    ):
        assert server.ask(path, body, key, method).status == 401
    assert "beta-a" in server.parts.registry.adapters


@pytest.mark.parametrize("name", ATTACKS)
def test_names_lead_nowhere(server: Running, name):
    key = server.keys["beta"]
    for answer in (
        server.ask("/v1/completions", asked(name), key),
        server.load(name),
        server.ask("/v1/load_lora_adapter", {"lora_name": "shared", "lora_path": name}, ADMIN),
    ):
        assert answer.status in (400, 404), answer.content
        told = answer.content.decode()
        assert str(server.folder) not in told
        assert "root:" not in told
        assert len(told) < 1000


def test_paths_lead_nowhere(server: Running):
    for path in (
        "/v1/adapters/..%2f..%2fetc%2fpasswd/page", "/v1/adapters/%2e%2e/page", "/page.js/../keys",
        "/v1/models/../../etc/passwd", "/v1/models/%00", "//v1//models", "/v1/adapters/beta-a/page",
        "/admin/adapters/..%2f..:pin",
    ):  # fmt: skip
        answer = server.ask(path, key=server.keys["acme"])
        assert answer.status in (400, 401, 404, 405), (path, answer.content)


def test_ids_of_clients_are_never_taken_over(server: Running):
    mine = {"X-Request-Id": "mine", "X-Tenant": "beta", "X-Forwarded-User": "admin"}
    for _ in range(2):
        answer = server.ask("/v1/models", key=server.keys["acme"], headers=mine)
        assert answer.headers["x-request-id"] != "mine"
        assert b"beta-a" not in answer.content


def test_an_unknown_act_tells_nothing_without_the_key(server: Running):
    assert server.ask("/admin/adapters/beta-a:wat", {}).code == "invalid_api_key"
    assert server.ask("/admin/adapters/beta-a:wat", {}, ADMIN).code == "no_route"
    assert "beta-a" not in server.ask("/openapi.json").content.decode()


def test_versions_can_be_looked_up(server: Running):
    digest = server.parts.registry.adapters["acme-a"].digest
    for name in ("acme-a", f"acme-a@{digest[:12]}"):
        assert server.ask(f"/v1/models/{name}", key=server.keys["acme"]).json["digest"] == digest
    for name in ("acme-a@", f"acme-a@{digest[:4]}", f"beta-a@{digest[:12]}"):
        assert server.ask(f"/v1/models/{name}", key=server.keys["acme"]).status == 404


def test_what_is_thought_about_is_shared_and_counted(server: Running, monkeypatch):
    rendering = server.parts.registry.base_model.renderer
    began, go = threading.Event(), threading.Event()
    tokens = rendering.tokens

    def slow(text: str, special: bool) -> tuple[int, ...]:
        if text == "slow":
            began.set()
            go.wait(20)
        return tokens(text, special)

    monkeypatch.setattr(rendering, "tokens", slow)
    most = server.parts.settings.limits.tenant_queue
    with ThreadPoolExecutor(most + 4) as pool:
        many, key = range(most + 4), server.keys["acme"]
        asked = [pool.submit(server.ask, "/tokenize", {"prompt": "slow"}, key) for _ in many]
        began.wait(20)
        assert server.ask("/tokenize", {"prompt": "x"}, server.keys["beta"]).status == 200
        while server.parts.host.waiting("acme") < most:
            time.sleep(0.01)
        refused = server.ask("/v1/completions", {"model": "acme-a"}, server.keys["acme"])
        go.set()
        codes = [one.result().status for one in asked]
    assert (refused.status, refused.code) == (429, "tenant_queue_full")
    assert set(codes) <= {200, 429}
    assert codes.count(200) >= most


def test_metrics_have_no_label_that_a_client_makes(server: Running):
    for i in range(20):
        server.ask("/v1/completions", asked(f"made-up-{i}"), server.keys["acme"])
        server.ask("/v1/completions", asked("acme-a"), f"made-up-key-{i}")
    text = server.metrics(ADMIN)
    assert "made-up" not in text
    assert 'outcome="model_not_found",tenant="acme"' in text
    assert 'outcome="invalid_api_key",tenant="none"' in text


def test_only_hashes_are_kept_and_a_key_can_be_revoked(server: Running):
    file = server.parts.settings.keys
    assert file is not None
    assert file.stat().st_mode & 0o077 == 0
    key = new_key(file, "gone", ["*"])
    assert key not in file.read_text()
    assert server.ask("/v1/models", key=key).status == 200
    content = json.loads(file.read_text())
    content["keys"] = [entry for entry in content["keys"] if entry["tenant"] != "gone"]
    file.write_text(json.dumps(content))
    assert server.ask("/v1/models", key=key).status == 401
    file.write_text("{")  # a mistake of the operator locks nobody out, and lets nobody in
    assert "lorafold_keys_outdated 1.0" in server.metrics(ADMIN)
    assert server.ask("/v1/models", key=server.keys["acme"]).status == 200
    assert server.ask("/v1/models", key=key).status == 401
    file.write_text(json.dumps(content))
    assert "lorafold_keys_outdated 0.0" in server.metrics(ADMIN)


def in_place_of(file: Path, make: Callable[[Path], object]) -> None:
    file.unlink()
    make(file)


FAULTS: dict[str, Callable[[Path], object]] = {
    "it is away": Path.unlink,
    "a directory in its place": lambda file: in_place_of(file, Path.mkdir),
    "a pipe in its place": lambda file: in_place_of(file, os.mkfifo),
    "a link to nothing": lambda file: in_place_of(file, lambda f: f.symlink_to("nowhere")),
    "half of it": lambda file: os.truncate(file, file.stat().st_size // 2),
    "nothing of it": lambda file: os.truncate(file, 0),
    "no text": lambda file: file.write_bytes(b"\xff\xfe"),
    "no keys": lambda file: file.write_text('{"keys": [{"tenant": 3}]}'),
    "no permission": lambda file: file.chmod(0),
    "no file descriptors": lambda file: None,
    "no fault": lambda file: None,
}


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("step", [0, 10**9, -(10**12)])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_key_is_revoked_whatever_became_of_the_file_before(tmp_path, fault, step, link):
    """The new file has the times of the faulty one, or of another clock, and the size of the
    first; it is written in its place, or comes by a link that leads elsewhere now.
    """
    file, when = tmp_path / "keys.json", 10**18
    stays, goes = (new_key(file, tenant, ["*"]) for tenant in ("stays", "goes"))
    size, content = file.stat().st_size, json.loads(file.read_text())
    revoked = json.dumps({"keys": content["keys"][:1]}).ljust(size)
    os.utime(file, ns=(when, when))
    keys = Keys(file, None)
    FAULTS[fault](file)
    if file.exists():
        os.utime(file, ns=(when + step, when + step))
    with no_descriptors() if fault == "no file descriptors" else nullcontext():
        for key in (stays, goes):  # the keys are those of before
            assert keys.caller(f"Bearer {key}")
    if file.is_dir():
        file.rmdir()
    elif link or not file.is_file():
        file.unlink(missing_ok=True)
    if link:
        file.symlink_to(tmp_path / "other.json")
    file.write_text(revoked)
    file.chmod(0o600)
    os.utime(file, ns=(when + step, when + step))
    assert keys.caller(f"Bearer {stays}").tenant == "stays"
    with pytest.raises(Refusal, match=r"no valid API key; .* or as x-api-key: KEY"):
        keys.caller(f"Bearer {goes}")


def test_every_hash_is_compared(tmp_path, monkeypatch):
    file = tmp_path / "keys.json"
    made = [new_key(file, f"t{i}", ["*"]) for i in range(5)]
    keys, compared, real = Keys(file, None), [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or real(a, b))
    for key in (made[0], made[4]):
        compared.clear()
        keys.caller(f"Bearer {key}")
        assert len(compared) == 6
    compared.clear()
    with pytest.raises(Refusal):
        keys.caller("Bearer no")
    assert len(compared) == 6


def test_the_command_prints_a_key_once(tmp_path):
    file = tmp_path / "keys.json"
    done = lorafold("serve", "new-key", "acme", "--adapters", "acme-*", "--keys", str(file))
    key = done.stdout.strip()
    assert done.returncode == 0
    assert key.startswith("lf-")
    assert len(key) > 40
    assert Keys(file, None).caller(f"Bearer {key}").adapters == ("acme-*",)
    assert [entry.tenant for entry in read(file, KeyFile, HINT).keys] == ["acme"]
    for tenant in ("", "admin", "../x", "a b"):
        assert lorafold("serve", "new-key", tenant, "--keys", str(file)).returncode == 2


def test_aliases_need_the_callers_glob(server: Running):
    assert server.ask("/admin/aliases/acme-now", {"target": "acme-a"}, ADMIN, "PUT").status == 200
    assert server.ask("/v1/completions", asked("acme-now"), server.keys["acme"]).status == 200
    assert server.ask("/v1/completions", asked("acme-now"), server.keys["beta"]).status == 404
    assert server.ask("/admin/aliases/acme-now", None, ADMIN, "DELETE").status == 200


def in_place(folder: Path, name: str, file: str, put: Callable[[Path], object]) -> None:
    """Copy the good adapter, with something else in place of one of its files."""
    shutil.copytree(folder / "good", folder / name)
    in_place_of(folder / name / file, put)


def test_links_and_borrowed_files_are_refused(tmp_path, llama):
    outside = saved(llama, {"real": lf.LoRA(rank=2)}, tmp_path / "outside")
    folder = saved(llama, {"good": lf.LoRA(rank=2)}, tmp_path / "in")
    (folder / "linked").symlink_to(outside / "real")
    tensors = "adapter_model.safetensors"
    real = outside / "real" / tensors
    in_place(folder, "weights", tensors, lambda file: file.symlink_to(real))
    in_place(folder, "hard", tensors, lambda file: os.link(real, file))
    in_place(folder, "pickled", tensors, lambda file: shutil.copy(real, file.with_suffix(".bin")))
    in_place(folder, "piped", "adapter_config.json", os.mkfifo)
    in_place(folder, "sealed", "manifest.json", lambda file: file.symlink_to("/etc/hostname"))
    (folder / "good.html").write_text("own")
    assert Directory(folder).page_file("good") is not None
    os.link(folder / "good.html", folder / "also.html")
    assert Directory(folder).page_file("good") is None
    directory = Directory(folder)
    assert directory.locate("good") == folder / "good"
    for name, told in {
        "linked": "leads outside", "weights": "leads outside", "..": "letters",
        "piped": "expected a regular file", "sealed": "leads outside",
    }.items():  # fmt: skip
        with pytest.raises(LorafoldError, match=told):
            directory.locate(name)
    wrong = ["hard", "linked", "pickled", "piped", "sealed", "weights"]
    with running(llama, folder) as server:
        assert list(server.parts.registry.adapters) == ["good"]
        assert sorted(server.parts.registry.rejected) == wrong
    # whoever links to the files of an adapter gets nothing of it, and takes nothing from it
    weights = folder / "good" / tensors
    shutil.copytree(folder / "good", folder / "borrowed", ignore=lambda *_: [weights.name])
    os.link(weights, folder / "borrowed" / weights.name)
    os.link(weights, tmp_path / "kept.safetensors")
    with running(llama, folder) as server:
        assert list(server.parts.registry.adapters) == ["good"]
        assert server.text("good", "The")
        assert sorted(server.parts.registry.rejected) == ["borrowed", *wrong]
        for name in ("borrowed", "hard"):
            assert "several hard links" in server.parts.registry.rejected[name]
        assert server.load("good").status == 200


def test_without_keys_only_this_machines_names_are_answered(serve_once):
    """A page from elsewhere whose name leads to this machine gets nothing, nor does a form."""
    server = serve_once()
    assert server.ask("/v1/models", headers={"Host": "evil.example"}).code == "wrong_host"
    assert server.ask("/v1/models", headers={"Host": "localhost:1"}).status == 200
    form = {"Content-Type": "text/plain"}
    assert server.ask("/v1/completions", asked("a"), headers=form).status == 415
    assert "access-control-allow-origin" not in server.ask("/v1/models").headers
