"""Who may do what: tenants and their adapters, the administrator, and nobody else."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import lorafold as lf
from conftest import lorafold
from lorafold.errors import LorafoldError
from lorafold.serving.directory import Directory
from lorafold.serving.keys import Keys, new_key, read_keys
from lorafold.serving.refusal import Refusal
from serving_cases import ADMIN, Running, running, saved

ATTACKS = [
    "../acme-a", "..", "/etc/passwd", "%2e%2e%2facme-a", "acme-a\0", "acme-a/../beta-a", ".hidden",
    "ACME-A", "‥/acme-a", "․․", "a" * 10000, "acme-a@", "acme-a@../../etc", "", " acme-a",
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tiny_model_dir, tmp_path_factory):
    """Two tenants with an adapter each, and one that both may use."""
    folder = tmp_path_factory.mktemp("keys")
    specs = {"acme-a": lf.LoRA(rank=2), "beta-a": lf.LoRA(rank=2), "shared": lf.LoRA(rank=2)}
    adapters = saved(tiny_model_dir("llama"), specs, folder / "adapters")
    keys = {"acme": ["acme-*", "shared"], "beta": ["beta-*", "shared"]}
    with running(tiny_model_dir("llama"), adapters, keys) as found:
        yield found


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
    named = [*server.parts.registry.found, "acme"]
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
    assert "beta-a" in server.parts.registry.found


@pytest.mark.parametrize("name", ATTACKS)
def test_names_lead_nowhere(server: Running, name):
    key = server.keys["beta"]
    for answer in (
        server.ask("/v1/completions", asked(name), key),
        server.ask("/v1/load_lora_adapter", {"lora_name": name}, ADMIN),
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
    digest = server.parts.registry.found["acme-a"].digest
    for name in ("acme-a", f"acme-a@{digest[:12]}"):
        assert server.ask(f"/v1/models/{name}", key=server.keys["acme"]).json["digest"] == digest
    for name in ("acme-a@", f"acme-a@{digest[:4]}", f"beta-a@{digest[:12]}"):
        assert server.ask(f"/v1/models/{name}", key=server.keys["acme"]).status == 404


def test_what_is_thought_about_is_shared_and_counted(server: Running, monkeypatch):
    """One tenant's large bodies keep no other one waiting, and are bounded."""
    rendering = server.parts.registry.plain.renderer
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
        asked = [
            pool.submit(server.ask, "/tokenize", {"prompt": "slow"}, server.keys["acme"])
            for _ in range(most + 4)
        ]
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
    text = server.ask("/metrics", key=ADMIN).content.decode()
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
    assert server.ask("/v1/models", key=server.keys["acme"]).status == 200
    assert server.ask("/v1/models", key=key).status == 401
    file.write_text(json.dumps(content))


def test_every_hash_is_compared(tmp_path, monkeypatch):
    """How long it takes does not depend on which key fits, or how far one does."""
    file = tmp_path / "keys.json"
    made = [new_key(file, f"t{i}", ["*"]) for i in range(5)]
    keys, compared = Keys(file, None), []
    from lorafold.serving import keys as module

    real = module.hmac.compare_digest
    monkeypatch.setattr(
        module.hmac, "compare_digest", lambda a, b: compared.append(a) or real(a, b)
    )
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
    assert [entry.tenant for entry in read_keys(file).keys] == ["acme"]
    for tenant in ("", "admin", "../x", "a b"):
        assert lorafold("serve", "new-key", tenant, "--keys", str(file)).returncode == 2


def test_aliases_need_the_callers_glob(server: Running):
    assert server.ask("/admin/aliases/acme-now", {"target": "acme-a"}, ADMIN, "PUT").status == 200
    assert server.ask("/v1/completions", asked("acme-now"), server.keys["acme"]).status == 200
    assert server.ask("/v1/completions", asked("acme-now"), server.keys["beta"]).status == 404
    assert server.ask("/admin/aliases/acme-now", None, ADMIN, "DELETE").status == 200


def test_links_and_borrowed_files_are_refused(tmp_path, tiny_model_dir):
    outside = saved(tiny_model_dir("llama"), {"real": lf.LoRA(rank=2)}, tmp_path / "outside")
    folder = saved(tiny_model_dir("llama"), {"good": lf.LoRA(rank=2)}, tmp_path / "in")
    (folder / "linked").symlink_to(outside / "real")
    shutil.copytree(folder / "good", folder / "weights")
    (folder / "weights" / "adapter_model.safetensors").unlink()
    (folder / "weights" / "adapter_model.safetensors").symlink_to(
        outside / "real" / "adapter_model.safetensors"
    )
    shutil.copytree(folder / "good", folder / "hard")
    (folder / "hard" / "adapter_model.safetensors").unlink()
    os.link(
        outside / "real" / "adapter_model.safetensors",
        folder / "hard" / "adapter_model.safetensors",
    )
    shutil.copytree(folder / "good", folder / "pickled")
    (folder / "pickled" / "adapter_model.safetensors").rename(
        folder / "pickled" / "adapter_model.bin"
    )
    shutil.copytree(folder / "good", folder / "piped")
    (folder / "piped" / "adapter_config.json").unlink()
    os.mkfifo(folder / "piped" / "adapter_config.json")
    shutil.copytree(folder / "good", folder / "sealed")
    (folder / "sealed" / "manifest.json").unlink()
    (folder / "sealed" / "manifest.json").symlink_to("/etc/hostname")
    (folder / "good.html").write_text("own")
    assert Directory(folder).page("good") is not None
    os.link(folder / "good.html", folder / "also.html")
    assert Directory(folder).page("good") is None
    directory = Directory(folder)
    assert directory.locate("good") == folder / "good"
    for name, told in {
        "linked": "leads outside", "weights": "leads outside", "hard": "2 links", "..": "letters",
        "piped": "neither a file", "sealed": "leads outside",
    }.items():  # fmt: skip
        with pytest.raises(LorafoldError, match=told):
            directory.locate(name)
    with running(tiny_model_dir("llama"), folder) as server:
        assert list(server.parts.registry.found) == ["good"]
        assert sorted(server.parts.registry.wrong) == [
            "hard", "linked", "pickled", "piped", "sealed", "weights",
        ]  # fmt: skip


def test_without_keys_only_this_machines_names_are_answered(tmp_path, tiny_model_dir):
    """A page from elsewhere whose name leads to this machine gets nothing, nor does a form."""
    folder = saved(tiny_model_dir("llama"), {"a": lf.LoRA(rank=2)}, tmp_path / "in")
    with running(tiny_model_dir("llama"), folder) as server:
        assert server.ask("/v1/models", headers={"Host": "evil.example"}).code == "wrong_host"
        assert server.ask("/v1/models", headers={"Host": "localhost:1"}).status == 200
        form = {"Content-Type": "text/plain"}
        assert server.ask("/v1/completions", asked("a"), headers=form).status == 415
        assert "access-control-allow-origin" not in server.ask("/v1/models").headers
