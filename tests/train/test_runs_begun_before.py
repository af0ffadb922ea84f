"""A run that an earlier version began goes on with rows that are read as they were then, or is
refused.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lorafold.data.stream import stream_of
from lorafold.errors import LorafoldError, shortened
from lorafold.machine.processes import ALONE
from lorafold.step.replicated import Replicated
from lorafold.training.checkpoint import RunDirectory
from lorafold.training.request import Request
from lorafold.training.run import train
from training_cases import quiet, request

# whose losses are nan at the second step, so that the run stops behind a checkpoint
STOPS = {"lr": 1e30, "lr_b": 1e30, "save_every": 1}
GOES_ON = "the loss is nan"


def begun_before(asked: Request, *without: str, **other: str) -> Request:
    """The same run, to be resumed, as a version began it that did not write these fields, and
    others otherwise.
    """
    with pytest.raises(LorafoldError, match=GOES_ON):
        train(asked, quiet())
    run = RunDirectory(asked.out)
    identity = json.loads((run.path / "run.json").read_text())
    for name in without:
        identity.pop(name, None)
    run.start(identity | other)
    return replace(asked, resume=True)


def resumed(asked: Request, console: Console | None = None, **fields: object) -> str:
    """What a resumed run is stopped by."""
    recipe = asked.recipe.model_copy(update=fields)
    with pytest.raises(LorafoldError) as caught:
        train(replace(asked, recipe=recipe), console or quiet())
    return str(caught.value)


@pytest.mark.few(1)
@pytest.mark.parametrize("content", ["Book a table", "Book <|im_end|> a table"])
def test_control_tokens_in_contents_were_tokens(
    content: str, tiny_model_dir, tmp_path: Path
) -> None:
    rows = [{"prompt": content, "completion": "a"}] * 8
    asked = replace(request(tiny_model_dir("llama"), tmp_path / "a", **STOPS), rows=rows)
    again = begun_before(asked, "allow_control_tokens", "control_tokens")
    if "<|im_end|>" in content:
        assert "control_tokens: was 'tokens', now 'text'" in resumed(again)
    else:
        assert GOES_ON in resumed(again)
    assert GOES_ON in resumed(again, allow_control_tokens=True)


ENDLESS = (
    "{% for m in messages %}{{ '### ' + m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}"
)


@pytest.mark.slow
@pytest.mark.parametrize("ends", [True, False])
def test_turns_ended_as_the_template_writes_them(
    ends: bool, tiny_model_dir, tmp_path: Path
) -> None:
    template = tmp_path / "endless.jinja"
    template.write_text(ENDLESS)
    fields = STOPS | ({} if ends else {"chat_template": str(template)})
    again = begun_before(
        request(tiny_model_dir("llama"), tmp_path / "a", **fields), "end_of_turn"
    )
    if ends:
        assert GOES_ON in resumed(again)
    else:
        assert "end_of_turn: was 'none', now 'auto'" in resumed(again)
        assert GOES_ON in resumed(again, end_of_turn="none")


# writes the reasoning of the last answer only
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.reasoning_content %}"
    "{{ m.reasoning_content }} {% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.slow
def test_steps_of_examples_where_they_are_of_rows_now(tiny_model_dir, tmp_path: Path) -> None:
    """A conversation of three answers gives three examples: a batch of one row has all of them, one
    of an earlier version had one.
    """
    template = tmp_path / "forgetful.jinja"
    template.write_text(FORGETFUL)
    said = {"role": "assistant", "content": "a", "reasoning_content": "b"}
    rows = [{"messages": [{"role": "user", "content": f"Book {n}"}, said] * 3} for n in range(4)]
    fields = {"batch": 1, "chat_template": str(template), "steps": None, "epochs": 1}
    asked = replace(
        request(tiny_model_dir("llama"), tmp_path / "a", **STOPS | fields), rows=rows
    )
    again = begun_before(asked, "batch_counts")
    told = Console(file=io.StringIO(), width=400)
    assert GOES_ON in resumed(again, told)
    assert re.search(r"resuming after step \d of 12$", told.file.getvalue(), re.M)  # type: ignore[attr-defined]
    now = begun_before(replace(asked, out=tmp_path / "b"))
    told = Console(file=io.StringIO(), width=400)
    assert GOES_ON in resumed(now, told)
    assert re.search(r"resuming after step \d of 4$", told.file.getvalue(), re.M)  # type: ignore[attr-defined]


@pytest.mark.parametrize("found", ["more", "fewer"])
def test_targets_that_mean_other_modules_now(found: str, tiny_model_dir, tmp_path: Path) -> None:
    asked = request(tiny_model_dir("llama"), tmp_path / "a", **STOPS)
    with pytest.raises(LorafoldError, match=GOES_ON):
        train(asked, quiet())
    again = replace(asked, resume=True)
    run = RunDirectory(again.out)
    [last] = run.checkpoints().values()
    progress, tensors, optimizer = run.load(last)
    some = {k: t for k, t in tensors.items() if k.split(".")[-2] in ("up_proj", "down_proj")}
    assert some
    if found == "more":
        tensors = {k: t for k, t in tensors.items() if k not in some}
        said = r"now adapts model\.layers\.0\.mlp\.down_proj and 3 more\."
    else:
        tensors |= {k.replace(".mlp.", ".indexer."): t.clone() for k, t in some.items()}
        said = r"no longer adapts model\.layers\.0\.indexer\.down_proj and 3 more\."
    pieces = Replicated(ALONE).pieces
    run.save(progress, pieces(tensors), pieces(optimizer), keep=2)
    assert re.search(rf"adapted other modules when it began: .* {said}", resumed(again))


@pytest.mark.slow
def test_files_that_are_streamed_are_known_by_their_content(tiny_model_dir, tmp_path: Path) -> None:
    file, out = tmp_path / "rows.jsonl", io.StringIO()
    row = {"prompt": "Book a table", "completion": "a"}
    file.write_text(f"{json.dumps(row)}\n" * 8)
    asked = request(tiny_model_dir("llama"), tmp_path / "a", streaming=True, **STOPS)
    asked = replace(asked, rows=stream_of(str(file)))
    again = begun_before(asked)
    assert GOES_ON in resumed(again)
    before = begun_before(replace(asked, out=tmp_path / "b"), data=f"{file} {file.stat().st_size}")
    assert GOES_ON in resumed(before, Console(file=out, width=999))
    assert f"did not say what was in {file}: whether the rows are the same" in out.getvalue()
    file.write_text(f"{json.dumps(row | {'completion': 'b'})}\n" * 8)
    other = replace(again, rows=stream_of(str(file)))
    changed = (shortened(repr(one.data.identity), 80) for one in (again, other))
    assert "data: was {}, now {}. Use".format(*changed) in resumed(other)
