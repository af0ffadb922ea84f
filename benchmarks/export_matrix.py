"""Which method over which base goes to which engine: as it is, by --as-lora, folded in, or not.

    python benchmarks/export_matrix.py [--python mlx=PATH] [--python vllm=PATH] [--only bases]
        [--base KIND ...]

Tiny random models with an update that is not small, exported to each target and proved in its
engine on four prompts; an engine in an environment of its own is named by its Python. A cell says
`proved` where the engine computed lorafold's distributions within 1% of what the adapter changes,
and `written` where no engine was asked; by `--as-lora` where the method is no product, with a rank
at which the update of these small matrices is whole. Refusals are numbered, and told below. An
interrupt keeps what was found.
"""

import argparse
import contextlib
import datetime
import re
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from lib.results import keep
from lib.short import parsed

TESTS = Path(__file__).parent.parent / "tests"
sys.path += [str(TESTS), str(TESTS / "lib")]

import gguf_models  # noqa: E402
import lorafold as lf  # noqa: E402
import mixtures  # noqa: E402
from conftest import make_model_dir, make_tokenizer  # noqa: E402
from lorafold.exporting.proof import BUILT_IN_PROMPTS  # noqa: E402
from lorafold.exporting.run import TARGETS  # noqa: E402
from lorafold.methods import METHODS  # noqa: E402

PROMPTS = 4
WHOLE = 64  # the rank of the tiny models' updates
SAME = {"llama.cpp": "gguf", "ollama": "gguf-model"}  # the same files, with words beside
# vLLM's attention on CPUs has heads of 32 and more; Gemma's scale is that of its heads
WIDE = {"hidden_size": 128, "head_dim": 32, "query_pre_attn_scalar": 32}
MORE = ("qwen2-moe", "gpt-oss", "deepseek-v3")


def made(kind: str, folder: Path) -> Path:
    """The directory of a tiny model of a kind."""
    if kind in gguf_models.CONFIGS:
        return gguf_models.saved(kind, folder, **WIDE)
    if kind not in MORE:
        return make_model_dir(kind, folder)
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = mixtures.CONFIGS[kind](vocab_size=len(tokenizer))
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def moved(base: Path, out: Path, method: str) -> Path:
    """The directory of an adapter whose update is not small."""
    adapter = lf.attach(lf.load_model(base, storage="fp32", device="cpu"), METHODS[method]())
    torch.manual_seed(0)
    for p in adapter.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return adapter.save(out)


class Matrix:
    """Exports, and why some were refused."""

    def __init__(self, folder: Path, pythons: dict[str, str]) -> None:
        self.folder, self.pythons = folder, pythons
        self.why: list[str] = []
        self.engines: dict[str, str] = {}
        self.prompts = folder / "prompts.jsonl"
        lines = BUILT_IN_PROMPTS.read_text().splitlines(keepends=True)[:PROMPTS]
        self.prompts.write_text("".join(lines))

    def cell(self, base: Path, adapter: Path, to: str) -> str:
        """What becomes of an adapter at a target."""
        try:
            return self.exported(base, adapter, to)
        except lf.LorafoldError as error:
            first = str(error)
        if "--as-lora" in first:
            try:
                return "`--as-lora`, " + self.exported(base, adapter, to, as_lora=WHOLE)
            except lf.LorafoldError as error:
                first = str(error)
        return f"refused {self.number(first.removeprefix(f'{to}: '))}"

    def exported(self, base: Path, adapter: Path, to: str, **options: int) -> str:
        done = lf.export(
            base, adapter, self.folder / "out", to=to, prompts=self.prompts, overwrite=True,
            engine_python=self.pythons.get(to), device="cpu", **options,
        )  # fmt: skip
        if done.proof is None:
            return "written"
        self.engines[to] = f"{done.proof.engine} {done.proof.version}"
        return "proved"

    def number(self, why: str) -> int:
        why = re.sub(r", which [^;]* can't say|--engine-python [^:]*: ", "", why)
        why = why.replace(f"{self.folder}/", "")
        if why not in self.why:
            self.why.append(why)
        return self.why.index(why) + 1

    def row(self, kind: str, method: str) -> dict[str, str]:
        """What becomes of a method over a base of a kind, by target."""
        base, adapter = self.folder / kind, self.folder / f"{kind}-{method}"
        found = {"base": kind, "method": method}
        try:
            base = base if base.exists() else made(kind, base)
            moved(base, adapter, method)
        except lf.LorafoldError as error:
            return found | {"peft": f"no adapter: {error}"}
        targets = [to for to in TARGETS if to not in SAME]
        found |= {to: self.cell(base, adapter, to) for to in targets}
        print(found, flush=True)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH")
    parser.add_argument("--only", choices=["methods", "bases"])
    kinds = [*gguf_models.CONFIGS, *MORE, "gpt2"]
    parser.add_argument("--base", nargs="+", default=kinds, choices=kinds, metavar="KIND")
    asked = parsed(parser, only="bases", base=["llama"])
    with tempfile.TemporaryDirectory() as scratch:
        matrix = Matrix(Path(scratch), dict(one.split("=", 1) for one in asked.python))
        methods = [("llama", method) for method in METHODS] * (asked.only != "bases")
        bases = [(kind, "lora") for kind in asked.base] * (asked.only != "methods")
        tables: list[list[dict[str, str]]] = []
        with contextlib.suppress(KeyboardInterrupt):
            for pairs in filter(None, (methods, bases)):
                tables.append([])
                for pair in pairs:
                    tables[-1].append(matrix.row(*pair))
        today = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
        proved = [
            {"target": to, "tested with": by, "on": today} for to, by in matrix.engines.items()
        ]
        why = [{"": n, "refused because": line} for n, line in enumerate(matrix.why, 1)]
    name = "export_matrix" if asked.only is None else f"export_{asked.only}"
    keep(name, *filter(None, (*tables, proved, why)), dtypes="fp32")


if __name__ == "__main__":
    main()
