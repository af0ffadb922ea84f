"""Installs the chat templates in llama.cpp's repository, which the sdist of llama-cpp-python
contains, below `sys.prefix`. Nothing is compiled. Tests that need them are skipped without them.

    python tests/lib/llama_cpp_templates.py llama-cpp-python==0.3.36
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

FOLDER = Path(sys.prefix, "share", "llama.cpp-templates")


def install(requirement: str) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    with TemporaryDirectory() as folder:
        subprocess.run([*pip, "--no-deps", "--dest", folder, requirement], check=True)
        [sdist] = Path(folder).glob("*.tar.gz")
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tarfile.open(sdist) as archive:
            for member in archive:
                path = Path(member.name)
                if path.suffix == ".jinja" and path.parts[-3:-1] == ("models", "templates"):
                    content = archive.extractfile(member)
                    assert content is not None
                    (FOLDER / path.name).write_bytes(content.read())


if __name__ == "__main__":
    install(sys.argv[1])
