"""Start-up and shutdown of the server.

The port is bound before the model is loaded, so an occupied port fails immediately. After SIGTERM
or Ctrl-C, running requests have `drain_seconds` to finish; a second signal ends the process
immediately.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import sys
import webbrowser
from collections.abc import Callable, Iterator
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path

import uvicorn
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorafold.core.anatomy import Anatomy
from lorafold.data.control_tokens import allow_tokens
from lorafold.errors import LorafoldError, listed
from lorafold.files.terminal import format_bytes
from lorafold.identity import joined, of_code
from lorafold.models.loading import recorded_storage
from lorafold.models.weights import InMemory
from lorafold.peft.provenance import RecordedBase
from lorafold.resolve import Base
from lorafold.runtime.memory import free_bytes
from lorafold.runtime.process_tuning import all_frozen
from lorafold.serving import logs
from lorafold.serving.app import application, bounded
from lorafold.serving.directory import Directory
from lorafold.serving.engine_backend import EngineBackend
from lorafold.serving.host import Admission, Host
from lorafold.serving.keys import Keys, TokenUsage
from lorafold.serving.metrics import Gauges, Metrics
from lorafold.serving.refusals import Refusal
from lorafold.serving.registry import STATE_FILE, Registry
from lorafold.serving.rendering import Renderers, ServedModel
from lorafold.serving.server import Server
from lorafold.serving.settings import Settings
from lorafold.serving.verifier import VerifiedCache, Verifier
from lorafold.verification.checks import Sandbox

# if this code changes, all adapters are verified again
VERIFYING_CODE = (
    "adapter", "layers", "core", "data", "engine", "files", "identity", "methods", "models", "ops",
    "peft", "verification", "serving",
)  # fmt: skip
VERIFYING_PACKAGES = ("safetensors", "tokenizers", "torch", "transformers")
# seconds until a thread yields the GIL to the event loop, which releases it at each system call
SWITCH_INTERVAL = 5e-4
BACKLOG = 4096  # connections waiting to be accepted; further ones retry after a second
Load = Callable[[Base], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


def bound_socket(settings: Settings) -> socket.socket:
    """Binds a socket. Without API keys, only a loopback address is allowed."""
    host, port, loopback = settings.host, settings.port, settings.host == "localhost"
    with contextlib.suppress(ValueError):
        loopback = loopback or ip_address(host).is_loopback
    if settings.keys is None and not loopback:
        raise LorafoldError(
            f"--host {host}: other machines can reach this address, so API keys are required;"
            " create one with lorafold serve new-key TENANT --keys FILE, and pass --keys FILE"
        )
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        at = socket.create_server((host, port), family=family, backlog=BACKLOG)
        # small kernel buffers keep unread data in this process, which limits it
        at.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
        at.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        # asyncio sets it only for sockets whose protocol is named; without it, what follows a small
        # packet waits for the client's acknowledgement, which may take 40 ms
        at.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return at
    except OSError as error:
        raise LorafoldError(
            f"--port {port}: can't listen on {host} ({error.strerror}); change --host or --port"
            " (--port 0 selects a free port)"
        ) from None


def serve(
    base: Base,
    load: Load,
    adapters: Path,
    settings: Settings,
    console: Console,
    open_page: bool = False,
    derived_base: RecordedBase | None = None,
) -> None:
    """Runs the server until a signal. If no option named the base, `derived_base` is the base that
    the adapters name; it is saved for the next start.
    """
    directory = Directory(adapters)
    keys = Keys(settings.keys, settings.admin_key, settings.metrics_key)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):  # macOS reports `unlimited` and rejects it
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with bound_socket(settings) as at:
        server = build_server(base, load, directory, keys, settings)
        if derived_base is not None:
            try:
                server.registry.save(base=derived_base)
            except LorafoldError as error:
                console.print(f"the base is not saved for the next start: {error}")
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"{host}:{at.getsockname()[1]}"
        _print_summary(server, address, console)
        logs.configure(settings.json_logs, settings.log_texts)
        if open_page:
            webbrowser.open(f"http://{address}/")  # the socket is already listening
        with all_frozen():
            asyncio.run(_run(server, at))


def build_server(
    base: Base, load: Load, directory: Directory, keys: Keys, settings: Settings
) -> Server:
    """Loads the model and builds the server. In requests, the base's name is the last part of its
    path, or its name if it is not a path. Verification of adapters begins when the server runs.
    """
    files, at, allowed = base.identity, Path(base.name), base.allow_other_base
    name = at.resolve().name if at.exists() else base.name
    model, tokenizer = load(base)
    if settings.allow_control_tokens:
        allow_tokens(tokenizer)
    # part of the identity, because the files don't determine the dtypes
    tensors = [[path, list(p.shape), str(p.dtype)] for path, p in model.named_parameters()]
    identity = joined([files, sha256(json.dumps(tensors).encode()).hexdigest()])
    state = settings.state or directory.pages_directory / STATE_FILE

    room = settings.adapter_bytes or free_bytes(model.device) // 2
    settings = settings.model_copy(update={"adapter_bytes": room})
    sandbox = Sandbox(
        lambda: [path for path, _ in Anatomy.of(model).modules],
        tokenizer, settings.allow_control_tokens, room // model.dtype.itemsize,
    )  # fmt: skip
    renderers = Renderers(model, tokenizer, sandbox)
    base_model = ServedModel(name, None, renderers.base, identity)
    code = of_code(*VERIFYING_CODE, packages=VERIFYING_PACKAGES)
    verified_for = joined([identity, code, *["any base"] * allowed])
    cache = VerifiedCache(state.with_name(f"{state.stem}-verified.json"), verified_for)
    metrics, weights = Metrics(), InMemory.of_model(model) if allowed else None
    backend = EngineBackend(model, tokenizer, settings, metrics.restarts.inc, allowed)
    stored = (recorded_storage(model) or {}).get("storage", "auto")
    verifier = Verifier(directory, sandbox, renderers, cache, name, backend, weights, stored)
    registry = Registry(base_model, directory, state, verifier, backend)
    host = Host(backend, registry, settings, metrics)
    usage = TokenUsage(state.with_name(f"{state.stem}-tokens.json"), lambda: keys.has_limits)
    metrics.registry.register(Gauges(metrics, host, registry, keys))
    admission = Admission(host, registry, usage, sandbox)
    return Server(settings, keys, registry, host, admission, metrics, usage)


def uvicorn_config(server: Server) -> uvicorn.Config:
    sys.setswitchinterval(SWITCH_INTERVAL)
    return uvicorn.Config(
        application(server), log_config=None, access_log=False, lifespan="on", ws="none",
        http=bounded(server.settings.limits), timeout_graceful_shutdown=2, server_header=False,
        backlog=1,
    )  # fmt: skip


async def _run(server: Server, at: socket.socket) -> None:
    http = Http(uvicorn_config(server))
    loop, drains = asyncio.get_running_loop(), list[asyncio.Task[None]]()

    def start_drain() -> None:
        if drains:
            os._exit(128 + signal.SIGTERM)
        server.host.draining = True
        drains.append(loop.create_task(_drain(server, http)))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, start_drain)
    await http.serve(sockets=[at])


async def _drain(server: Server, http: uvicorn.Server) -> None:
    loop = asyncio.get_running_loop()
    until = loop.time() + server.settings.drain_seconds
    while (server.host.jobs or http.server_state.tasks) and loop.time() < until:
        await asyncio.sleep(0.05)
    ended = Refusal(503, "not_ready", "the server is shutting down", retry_after=1)
    for job in list(server.host.jobs.values()):
        server.host.cancel(job, ended)
    if server.host.jobs:
        await asyncio.sleep(0.5)  # clients receive their last events
    http.should_exit = True


class Http(uvicorn.Server):
    """uvicorn without its signal handlers, which would end the process. It starts with a backlog of
    1, so that asyncio accepts one connection at a time; otherwise, without free file descriptors,
    asyncio would retry and log for each waiting connection.
    """

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for at in sockets or ():
            at.listen(BACKLOG)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _print_summary(server: Server, address: str, console: Console) -> None:
    registry, backend, keys = server.registry, server.host.backend, server.keys
    names, state, lines = registry.unverified, registry.state, list[str]()
    several = "adapter" if len(names) == 1 else "adapters"
    lines.append(f"base {registry.base}, {len(names)} {several}: {listed(names) or 'none'}")
    if without_config := registry.directory.without_config():
        lines.append(f"ignored (no adapter_config.json): {', '.join(without_config)}")
    if state.unloaded:
        lines.append(f"unloaded by the administrator: {', '.join(state.unloaded)}")
    lines += [f"in quarantine: {name}: {why}" for name, (_, why) in state.quarantined.items()]
    if unknown := sorted(server.settings.weights.keys() - set(keys.tenants)):
        lines.append(f"weights: these tenants have no key: {', '.join(unknown)}")
    now, limit = backend.states(), "as set" if server.settings.length else "the model's"
    if now.alone:
        lines.append(f"requests run one at a time: {now.alone}")
    limit = "all that fit into memory" if backend.length == now.kv_tokens else limit
    room = f"{format_bytes(now.kv_bytes)} for {now.kv_tokens:,} tokens of keys and values"
    who = f"tenants with keys: {len(keys.tenants)}" if keys.file else "no API keys (local only)"
    model = names[0] if names else registry.base
    key, bearer = "none", ""
    if keys.file:
        key, bearer = "$KEY", ' -H "Authorization: Bearer $KEY"'
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    lines += [
        f"context: {backend.length:,} tokens, {limit}" + f"; {room}" * (not now.alone),
        f"{server.settings.slots} slots, {who}",
        f"listening at http://{address}; press Ctrl-C to stop",
        f"  curl http://{address}/v1/chat/completions -H 'Content-Type: application/json'{bearer}"
        f" -d '{body}'",
        f"  OPENAI_BASE_URL=http://{address}/v1 OPENAI_API_KEY={key} python -c 'import openai;"
        f' print(openai.OpenAI().chat.completions.create(model="{model}",'
        ' messages=[{"role": "user", "content": "Hello"}]).choices[0].message.content)\'',
        f"  python -m webbrowser http://{address}/",
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
