"""From options to a listening server, and its orderly end.

The port is taken before the model is loaded, so that one that is in use is told at once. On SIGTERM
or Ctrl-C what runs may end, for as long as the settings say, and nothing new begins; a second
signal ends the process at once.
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
from lorafold.data.control_tokens import allow
from lorafold.errors import LorafoldError, listed
from lorafold.identity import joined, of_code
from lorafold.models.loading import recorded_storage
from lorafold.models.weights import InMemory
from lorafold.peft.provenance import OwnBase
from lorafold.resolve import Base
from lorafold.runtime.memory import free_bytes
from lorafold.runtime.process_tuning import all_set_aside
from lorafold.serving import logs
from lorafold.serving.app import application, bounded
from lorafold.serving.directory import Directory
from lorafold.serving.engine_backend import InProcess
from lorafold.serving.errors import Refusal
from lorafold.serving.host import Admission, Host
from lorafold.serving.keys import Keys, Spent, beside
from lorafold.serving.metrics import Gauges, Metrics
from lorafold.serving.registry import STATE, Registry
from lorafold.serving.rendering import Renderers, ServedModel
from lorafold.serving.server import Server
from lorafold.serving.settings import Settings
from lorafold.serving.verifier import VerifiedCache, Verifier
from lorafold.verification.checks import Screen

# what an adapter that was verified once is known for, beside its files and the base
ROOMS = (
    "adapter", "layers", "core", "data", "engine", "files", "identity", "methods", "models", "ops",
    "peft", "verification", "serving",
)  # fmt: skip
# seconds for which a thread may keep the interpreter from the event loop, which asks for it again
# after each call of the system
SWITCH = 5e-4
BACKLOG = 4096  # connections that wait to be accepted: one more tries again after a second
PACKAGES = ("safetensors", "tokenizers", "torch", "transformers")


# what loads a base and its tokenizer
Load = Callable[[Base], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


def listening(settings: Settings) -> socket.socket:
    """A socket at the settings' address."""
    if settings.keys is None and not _is_here(settings.host):
        raise LorafoldError(
            f"--host {settings.host}: others can reach it, so that keys are needed: make one with"
            " lorafold serve new-key TENANT --keys FILE, and pass --keys FILE"
        )
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        at = socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
        # what a client does not read stays here, where it is bounded, and not in the kernel
        at.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
        at.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)  # nor what it sends unasked
        return at
    except OSError as error:
        raise LorafoldError(
            f"--port {settings.port}: {settings.host} can't be listened at ({error.strerror});"
            " --port 0 takes a free one"
        ) from None


def serve(
    base: Base,
    load: Load,
    adapters: Path,
    settings: Settings,
    console: Console,
    open_page: bool = False,
    own: OwnBase | None = None,
) -> None:
    """Serve until a signal ends it."""
    directory, keys = Directory(adapters), Keys(
        settings.keys, settings.admin_key, settings.metrics_key
    )
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # files and connections
    with contextlib.suppress(OSError, ValueError):  # macOS calls unlimited what it does not allow
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with listening(settings) as at:
        server = server_of(base, load, directory, keys, settings)
        if own is not None:
            try:
                server.registry.keep(base=own)
            except LorafoldError as error:
                console.print(f"the next start takes the base that most name: {error}")
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"{host}:{at.getsockname()[1]}"
        _tell(server, address, console)
        logs.set_up(settings.json_logs, settings.log_texts)
        if open_page:
            webbrowser.open(f"http://{address}/")  # the socket listens already
        with all_set_aside():
            asyncio.run(_run(server, at))


def server_of(
    base: Base, load: Load, directory: Directory, keys: Keys, settings: Settings
) -> Server:
    """A server that is ready to start: the model is loaded, and adapters are verified once it runs.
    """
    files, at, allowed = base.identity, Path(base.name), base.allow_other_base
    name = at.resolve().name if at.exists() else base.name
    model, tokenizer = load(base)
    if settings.allow_control_tokens:
        allow(tokenizer)
    identity = joined([files, _storage(model)])
    state = settings.state or directory.beside / STATE
    free = settings.allow_control_tokens

    def modules() -> list[str]:
        return [path for path, _ in Anatomy.of(model).modules]

    room = settings.adapter_bytes or free_bytes(model.device) // 2
    settings = settings.model_copy(update={"adapter_bytes": room})
    screen = Screen(modules, tokenizer, free, room // model.dtype.itemsize)
    renderers = Renderers(model, tokenizer, screen)
    plain = ServedModel(name, None, renderers.base, identity)
    known_for = joined([identity, of_code(*ROOMS, packages=PACKAGES), *["any base"] * allowed])
    seen = VerifiedCache(state.with_name(f"{state.stem}-verified.json"), known_for)
    metrics, weights = Metrics(), InMemory.of_model(model) if allowed else None
    backend = InProcess(model, tokenizer, settings, metrics.restarts.inc, allowed)
    stored = (recorded_storage(model) or {}).get("storage", "auto")
    verifier = Verifier(directory, screen, renderers, seen, name, backend, weights, stored)
    registry = Registry(plain, directory, state, verifier, backend)
    host = Host(backend, registry, settings, metrics)
    spent = Spent(beside(state), lambda: keys.limited)
    metrics.registry.register(Gauges(metrics, host, registry, keys))
    return Server(
        settings, keys, registry, host, Admission(host, registry, spent, screen), metrics, spent
    )


def _storage(model: PreTrainedModel) -> str:
    """The digest of how a model's tensors are stored, which its files don't say."""
    parts = [[path, list(p.shape), str(p.dtype)] for path, p in model.named_parameters()]
    return sha256(json.dumps(parts).encode()).hexdigest()


def over_http(server: Server) -> uvicorn.Config:
    """How a server is reached."""
    sys.setswitchinterval(SWITCH)
    return uvicorn.Config(
        application(server), log_config=None, access_log=False, lifespan="on", ws="none",
        http=bounded(server.settings.limits), timeout_graceful_shutdown=2, server_header=False,
        backlog=1,
    )  # fmt: skip


async def _run(server: Server, at: socket.socket) -> None:
    http = Http(over_http(server))
    loop, drains = asyncio.get_running_loop(), list[asyncio.Task[None]]()

    def ask() -> None:
        if drains:
            os._exit(128 + signal.SIGTERM)
        server.host.draining = True
        drains.append(loop.create_task(_drain(server, http)))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask)
    await http.serve(sockets=[at])


async def _drain(server: Server, http: uvicorn.Server) -> None:
    """Let what runs end, for as long as it may, and then the server."""
    loop = asyncio.get_running_loop()
    until = loop.time() + server.settings.drain_seconds
    while (server.host.jobs or http.server_state.tasks) and loop.time() < until:
        await asyncio.sleep(0.05)
    ended = Refusal(503, "not_ready", "the server ends", retry_after=1)
    for job in list(server.host.jobs.values()):
        server.host.cancel(job, ended)
    if server.host.jobs:
        await asyncio.sleep(0.5)  # for their last events
    http.should_exit = True


class Http(uvicorn.Server):
    """uvicorn without its handlers of signals, which would end the process with the signal. It
    accepts one connection at a time: without file descriptors asyncio would try, and log, as many
    times as its backlog, again and again.
    """

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, with the backlog of `listening`."""
        await super().startup(sockets)
        for at in sockets or ():
            at.listen(BACKLOG)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _tell(server: Server, address: str, console: Console) -> None:
    """Say what is served, what is not and why, and how to use it."""
    registry, backend = server.registry, server.host.backend

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    names = registry.listed
    several = "adapter" if len(names) == 1 else "adapters"
    say(f"base {registry.base}, {len(names)} {several}: {listed(names) or 'none'}")
    if others := registry.directory.others():
        say(f"no adapters: {', '.join(others)} (without adapter_config.json)")
    if registry.kept.unloaded:
        say(f"unloaded by the administrator: {', '.join(registry.kept.unloaded)}")
    for name, (_, why) in registry.kept.quarantined.items():
        say(f"in quarantine: {name}: {why}")
    if unknown := sorted(server.settings.weights.keys() - set(server.keys.tenants)):
        say(f"weights: no tenant has a key yet: {', '.join(unknown)}")
    if why := backend.states().alone:
        say(f"requests run one at a time: {why}")
    tenants = server.keys.tenants
    who = f"{len(tenants)} tenants with keys" if server.keys.file else "no keys, for this machine"
    say(f"{server.settings.slots} slots of {backend.length:,} tokens, {who}")
    say(f"listening at http://{address}; Ctrl-C ends it")
    model = names[0] if names else registry.base
    key = "$KEY" if server.keys.file else "none"
    bearer = ' -H "Authorization: Bearer $KEY"' if server.keys.file else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    say(
        f"  curl http://{address}/v1/chat/completions -H 'Content-Type: application/json'{bearer}"
        f" -d '{body}'"
    )
    say(
        f"  OPENAI_BASE_URL=http://{address}/v1 OPENAI_API_KEY={key} python -c 'import openai;"
        f' print(openai.OpenAI().chat.completions.create(model="{model}",'
        ' messages=[{"role": "user", "content": "Hello"}]).choices[0].message.content)\''
    )
    say(f"  python -m webbrowser http://{address}/")
