"""What all processes of a run must have in common, compared before anything is loaded: on another
machine there may be another lorafold, other files under the same names, other rows.
"""

from __future__ import annotations

import socket
from hashlib import sha256
from importlib.metadata import version
from typing import Any

from lorafold.errors import LorafoldError, listed, shortened
from lorafold.files.atomic import MANIFEST
from lorafold.identity import COMPUTED_WITH, TRAINING, of_code
from lorafold.training.checkpoint import RunDirectory
from lorafold.training.setup import Setup
from lorafold.training.start import depends_on

SHOWN = 40  # characters of a value


def check_alike(setup: Setup) -> None:
    """Raise LorafoldError, the same in all processes, unless they have the same code, files, rows,
    recipe and kind of device, and see the run to resume.
    """
    request, processes = setup.request, setup.processes
    if processes.count == 1:
        return
    recipe = request.recipe.model_dump(mode="json")
    own: dict[str, Any] = {
        "lorafold": f"{version('lorafold')} ({of_code(*TRAINING)[:8]})",
        **{name: version(name) for name in COMPUTED_WITH},
        **{f"the files of {of['name']}": of["sha256"][:8] for of in setup.files.values()},
        "the rows": request.data.identity[:SHOWN],
        **{name: str(value) for name, value in depends_on(request, setup.objective).items()},
        **{name: str(value) for name, value in recipe.items()},
        "the device": request.base.where.type,
    }
    if request.resume:
        own["the run to resume"] = seen(RunDirectory(request.out))
    (host, first), *others = processes.gather((socket.gethostname(), own))
    for number, (there, theirs) in enumerate(others, 1):
        if differing := [
            f"{name}: {shortened(theirs.get(name, 'none'), SHOWN)} there,"
            f" {shortened(first.get(name, 'none'), SHOWN)} in process 0"
            for name in dict.fromkeys([*first, *theirs])
            if theirs.get(name) != first.get(name)
        ]:
            where = there if there == host else f"{there}, process 0 on {host}"
            raise LorafoldError(
                f"process {number} on {where}: found {listed(differing, '; ', room=140)}; expected"
                " the same in all processes"
            )


def seen(run: RunDirectory) -> str:
    """What this process sees of a run to resume, as a text: where the file system is not the same
    for all, its directory may be another one.
    """
    if not run.path.exists():
        return "none"
    if not (checkpoints := run.checkpoints()):
        return "one without checkpoints"
    last = max(checkpoints)
    try:
        content = (checkpoints[last] / MANIFEST).read_bytes()
    except OSError:
        return f"step {last} (damaged)"
    return f"step {last} ({sha256(content).hexdigest()[:8]})"
