"""What runs in an engine's process: it has the engine's file answer a job, and writes the answers.

    program.py in_NAME.py JOB.json
    job        base       the directory or file of the base, or of the merged model
               ids        the tokens of each prompt
               texts      the prompts as texts
               chats      what they are of: messages and tools
               greedy     how many tokens a greedy text has
               ends       the tokens that end it
               out        the .npz file to write
    answers    adapted    (prompts, vocabulary) log-probabilities of the next token
               base       the same without adapters, of the first prompts, if the engine can
               greedy     tokens of each prompt, without those that end it
               version    of the engine
               unused     the tensors of the files that it did not take, if it tells
               other_tokens    the prompts whose texts it tokenizes in another way, if it can tell
               other_texts     the prompts that its own template application writes in another way
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(engine: str, asked: str) -> None:
    """Answer a job."""
    job = json.loads(Path(asked).read_text(encoding="utf-8"))
    found = runpy.run_path(engine)["answers"](job)
    greedy = np.full((len(found["greedy"]), job["greedy"]), -1, np.int64)
    for row, tokens in zip(greedy, found.pop("greedy"), strict=True):
        row[: len(tokens)] = tokens
    rows = {name: found.pop(name) for name in ("adapted", "base") if name in found}
    kept: dict[str, Any] = {name: np.stack(each).astype(np.float32) for name, each in rows.items()}
    kept |= {"greedy": greedy, "about": np.array(json.dumps(found))}
    np.savez(job["out"], allow_pickle=False, **kept)


if __name__ == "__main__":
    main(*sys.argv[1:])
