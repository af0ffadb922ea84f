"""The wheel, as a user gets it: built, installed by pip into an environment of its own, used there.

The environment reads lorafold's dependencies, gigabytes to install, from where the tests run, by
way of a .pth file; only the wheel has the package.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import pytest

from lorafold.cli import COMMANDS, GROUPS, LAB
from lorafold.serving.routes import page

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": f"Book a table for {n}", "completion": f'{{"people": {n}}}'} for n in range(8)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*pip, "--wheel-dir", out, ROOT], check=True)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=False)
    python = root / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--quiet", wheel], check=True)
    (packages,) = root.glob("lib/python3.*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return root / "bin"


def run(program: Path, *arguments: str | Path, cwd: Path) -> str:
    """The output of a program of the environment, without this process's own paths."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    command = [program, *arguments]
    done = subprocess.run(command, cwd=cwd, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_its_license_and_types_and_nothing_else(wheel: Path) -> None:
    files = ZipFile(wheel).namelist()
    about = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
    assert {name.split("/")[0] for name in files} == {"lorafold", about}
    assert {"lorafold/py.typed", f"{about}/licenses/LICENSE"} <= set(files)
    sources = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src").rglob("*.py")}
    assert {name for name in files if name.endswith(".py")} == sources
    assert {f"lorafold/{name}" for name in page.FILES.values()} <= set(files)
    text = ZipFile(wheel).read(f"{about}/licenses/LICENSE")
    assert text == (ROOT / "LICENSE").read_bytes()
    assert text.lstrip().startswith(b"Apache License")


def test_the_metadata_say_what_a_user_asks(wheel: Path) -> None:
    with ZipFile(wheel) as files:
        (name,) = (n for n in files.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(files.read(name))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["Version"] == project["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "lorafold contributors"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert len(metadata.get_all("Requires-Dist")) >= len(project["dependencies"])


def test_the_command_and_the_package_are_the_wheels(installed: Path, tmp_path: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run(installed / "lorafold", "--version", cwd=tmp_path) == f"lorafold {version}\n"
    text = run(installed / "lorafold", "--help", cwd=tmp_path)
    lab = run(installed / "lorafold", LAB, "--help", cwd=tmp_path)
    assert all(name in (lab if name in GROUPS["Lab"] else text) for name in COMMANDS)
    script = "import lorafold, sys; print(lorafold.__file__, 'torch' in sys.modules)"
    where, has_torch = run(installed / "python", "-c", script, cwd=tmp_path).split()
    assert Path(where).is_relative_to(installed.parent)
    assert has_torch == "False"


TRAIN = """
import json, sys, torch
import lorafold as lf
from pathlib import Path
from rich.console import Console
from lorafold.models.loading import load_model
from lorafold.resolve import Base
from lorafold.recipe.recipe import Recipe
from lorafold.training.inputs import RunRequest
from lorafold.training.run import train

model, rows = sys.argv[1:]
recipe = Recipe(steps=2, batch=4, storage="fp32")
trained = train(
    RunRequest(Base(model, device="cpu"), Path("out"), recipe, json.loads(rows), "rows"),
    Console(quiet=True),
)
adapter = lf.load(load_model(model, torch.float32), "out")
print(json.dumps({"losses": trained.losses, "spec": repr(adapter.spec), "file": lf.__file__}))
"""


def test_it_trains_and_loads_from_python(installed: Path, tiny_model_dir, tmp_path: Path) -> None:
    arguments = ("-c", TRAIN, str(tiny_model_dir("llama")), json.dumps(ROWS))
    found = json.loads(run(installed / "python", *arguments, cwd=tmp_path).splitlines()[-1])
    assert len(found["losses"]) == 2
    assert all(5 < loss < 7 for loss in found["losses"])  # ln 300 = 5.7
    assert found["spec"].startswith("LoRA(rank=16")
    assert Path(found["file"]).is_relative_to(installed.parent)
