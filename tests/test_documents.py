"""What the README and the examples show is run as it stands."""

import os
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_readme_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2: Path
) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert os.path.isfile(tmp_path / "my-adapter" / "adapter_model.safetensors")
    # B is still zero: merging and loading change nothing
    assert scope["torch"].equal(scope["model"](scope["ids"]).logits, scope["bare"])


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_run(path: Path, smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    first, last = map(
        float,
        re.search(r"loss ([\d.]+) at first, ([\d.]+) at last", capsys.readouterr().out).groups(),
    )
    assert last < 0.5 * first
