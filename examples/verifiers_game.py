"""An environment of the `verifiers` package (0.1), which lives in a virtual environment of its own.

    python -m venv verifiers && verifiers/bin/pip install "verifiers<0.2"
    VERIFIERS=verifiers/bin/python lorafold train --objective grpo --data rows.jsonl \
        --environment verifiers_game.py:rollout --out guesser

This file is read twice: lorafold takes `rollout`, which hands each rollout to one process of that
virtual environment. There, `serve` runs the environment against the policy's OpenAI endpoint. Rows
have a prompt, and the number as `answer`.
"""

import asyncio
import json
import os
import sys

answers = {}
started = None


async def start():
    """The process with the environment, and a task that reads its answers."""
    process = await asyncio.create_subprocess_exec(
        os.environ["VERIFIERS"], __file__,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip

    async def read():
        while line := await process.stdout.readline():
            number, reward = json.loads(line)
            answers.pop(number).set_result(reward)

    process.reader = asyncio.create_task(read())
    return process


async def rollout(policy, row):
    global started
    started = started or asyncio.ensure_future(start())
    process, number = await started, len(answers) + id(policy)
    answers[number] = asyncio.get_running_loop().create_future()
    asked = [number, policy.url, policy.messages, str(row["answer"])]
    process.stdin.write(json.dumps(asked).encode() + b"\n")
    return await answers[number]


async def serve():
    import verifiers as vf
    from datasets import Dataset
    from verifiers.types import ClientConfig

    class Guess(vf.MultiTurnEnv):
        @vf.stop
        async def guessed(self, state):
            replies = state["trajectory"]
            return bool(replies) and said(replies[-1]["completion"]) == state["answer"]

        async def env_response(self, messages, state):
            return [{"role": "user", "content": "Wrong. Guess again, with one digit."}]

    def said(completion):
        if not completion:  # aborted
            return ""
        last = completion[-1]
        text = last["content"] if isinstance(last, dict) else last.content
        return next((c for c in text if c.isdigit()), "")

    def right(completion, answer):
        return float(said(completion) == answer)

    rubric = vf.Rubric(funcs=[right])
    nothing = Dataset.from_list([{"question": "-", "answer": "-"}])
    env = Guess(dataset=nothing, rubric=rubric, max_turns=4)

    async def answer(number, url, messages, wanted):
        os.environ["ANY_KEY"] = "none"
        client = ClientConfig(api_base_url=url, api_key_var="ANY_KEY", max_retries=0)
        given = {"prompt": messages, "answer": wanted, "example_id": 0}
        output = await env.run_rollout(given, client, "policy", {})
        print(json.dumps([number, output["reward"]]), file=told, flush=True)

    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    tasks = set()
    while line := await reader.readline():
        task = asyncio.create_task(answer(*json.loads(line)))
        task.add_done_callback(lambda done: done.result())  # prints an error
        tasks.add(task)


if __name__ == "__main__":
    told, sys.stdout = sys.stdout, sys.stderr  # the package prints, too
    asyncio.run(serve())
