"""Fixtures of the tests of servers, for `pytest_plugins` of a module."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

import lorafold as lf
from conftest import make_model_dir
from lorafold.serving.routes import models as routes
from serving_cases import Running, running, saved

ONE = {"a": lf.LoRA(rank=2)}


@pytest.fixture(scope="session")
def llama(tiny_model_dir) -> Path:
    return tiny_model_dir("llama")


@contextmanager
def starting(llama: Path, folders: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    with ExitStack() as stack:

        def start(
            specs: Mapping[str, Any] = ONE, keys: Any = None, template: str = "", **settings: Any
        ) -> Running:
            folder, model = folders.mktemp("served"), llama
            if template:
                model = make_model_dir("llama", folder / "base")
                (model / "chat_template.jinja").write_text(template)
            adapters = saved(model, specs, folder / "adapters")
            return stack.enter_context(running(model, adapters, keys, **settings))

        yield start


@pytest.fixture(scope="module")
def serve(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Starts servers of adapters of a tiny model that run until the module's tests end."""
    with starting(llama, tmp_path_factory) as start:
        yield start


@pytest.fixture
def serve_once(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Starts servers likewise that run until the test ends."""
    with starting(llama, tmp_path_factory) as start:
        yield start


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    key = next(iter(server.keys.values()), "none")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def often() -> Iterator[None]:
    """The server looks for changes ten times a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes, "SNAPSHOT_INTERVAL", 0.1)
        yield
