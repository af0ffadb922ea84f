"""Admission: what a request must fulfil before the engine gets it.

Where the queue is full, it is refused at once, with the seconds after which it is likely not to be.
Adapters are verified, and conversations, tokens and grammars made, by a few threads beside the
engine's, so that neither the engine nor the event loop waits for them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from lorafold.engine import Request, Sampling
from lorafold.errors import LorafoldError
from lorafold.serving.host import Host
from lorafold.serving.job import Job, Reply
from lorafold.serving.keys import Caller
from lorafold.serving.refusal import FIELDS, Refusal, wrong
from lorafold.serving.registry import Registry
from lorafold.serving.rendering import Chosen, Renderer
from lorafold.serving.spent import Spent
from lorafold.serving.wire.body import Completing

LEAVING = 4  # times as many may be about to end as may wait: they end with the engine's next step
RETRIES = 3  # an adapter's version may be replaced between its choice and its use
Prompts = Callable[[Renderer], Sequence[tuple[int, ...]]]


@dataclass(frozen=True)
class Asked:
    """One request, whatever its dialect.

    model, n: As asked for.
    prompts: Gives the tokens of each prompt; it may take its time.
    field: The field with the prompts.
    sampling: The settings of all completions, but for the seed and the grammar.
    seed: That of the first one, or None.
    max_new_tokens: None: what is left of the length.
    ends: Whether the model may end a completion.
    grammar: Gives the grammar that a completion has to fit, or None.
    """

    model: str
    prompts: Prompts
    field: str
    sampling: Sampling
    n: int = 1
    seed: int | None = None
    max_new_tokens: int | None = None
    ends: bool = True
    grammar: Callable[[Renderer], str | None] = lambda renderer: None

    def rendered(self, renderer: Renderer) -> tuple[Sequence[tuple[int, ...]], Sampling]:
        """The tokens of each prompt, and the settings with the grammar. Raises Refusal."""
        prompts, lark = self.prompts(renderer), self.grammar(renderer)
        return prompts, self.sampling if lark is None else replace(self.sampling, lark=lark)


class Desk:
    """Where requests are admitted.

    Args:
        host: computes them.
        registry: knows the adapters.
        spent: the tokens that tenants were given.
    """

    def __init__(self, host: Host, registry: Registry, spent: Spent) -> None:
        self.host, self.registry, self.spent = host, registry, spent
        self.limits = host.settings.limits

    def check(self, body: Completing) -> None:
        """Raise Refusal for a body that asks for more than anybody may."""
        if not 1 <= body.n <= self.limits.choices:
            raise wrong("n", f"found {body.n}, expected 1 to {self.limits.choices}")
        for name, n, most in (
            ("stop", len(body.stops), self.limits.stops),
            ("logit_bias", len(body.logit_bias), self.limits.biases),
        ):
            if n > most:
                raise wrong(name, f"found {n} of them, expected at most {most}")

    async def admit(self, caller: Caller, id: str, since: float, asked: Asked) -> Reply:
        """The reply to a request, whose completions are on their way. Raises Refusal, and then
        nothing is computed.

        Args:
            caller: who asks.
            id: the name of the reply.
            since: when the request came, by time.monotonic.
            asked: what is asked.
        """
        self.check_room(caller.tenant, asked.n)
        self.spent.check(caller)
        reply = Reply(id)
        try:
            await self.host.think(partial(self._submit, caller, since, asked, reply), caller.tenant)
        except BaseException:
            self.drop(reply)
            raise
        for job in reply.jobs:
            job.admitted = True
        prompts = sum(len(job.request.prompt) for job in reply.jobs[:: asked.n])
        self.spent.add(caller.tenant, prompts)
        return reply

    def _submit(self, caller: Caller, since: float, asked: Asked, reply: Reply) -> None:
        """Choose, render and submit. It takes its time, and calls nothing of the event loop."""
        count = partial(self.spent.add, caller.tenant)
        seed = secrets.randbits(48) if asked.seed is None else asked.seed
        for _ in range(RETRIES):
            chosen = self.registry.choose(caller, asked.model)
            renderer = chosen.renderer
            prompts, sampling = asked.rendered(renderer)
            if asked.n * len(prompts) > self.limits.choices:
                told = f"found {len(prompts)} prompts and n {asked.n}, expected at most"
                raise wrong(asked.field, f"{told} {self.limits.choices} completions")
            # this request is counted as one that is thought about
            self.check_room(caller.tenant, asked.n * len(prompts) - 1)
            jobs: list[Job] = []
            try:
                for i, prompt in enumerate(p for p in prompts for _ in range(asked.n)):
                    request = Request(
                        f"{reply.id}.{i}", prompt, self._new_tokens(asked, prompt), chosen.key,
                        replace(sampling, seed=(seed + i) % (1 << 63)),
                        renderer.ends if asked.ends else frozenset(), caller.tenant,
                        renderer.tokenizer,
                    )  # fmt: skip
                    job = Job(request, chosen.name, since, reply.arrived, count)
                    self.host.submit(job)
                    jobs.append(job)
                reply.runs(chosen, len(prompts), jobs)
                return
            except LorafoldError as error:
                self._drop(jobs)
                if chosen.key is None or chosen.key in self.host.engine.adapters.names():
                    raise self._refusal(error, asked, chosen) from None
            except BaseException:
                self._drop(jobs)
                raise
        raise Refusal(503, "adapter_changed", f"{asked.model} is being replaced", retry_after=1)

    async def count(self, caller: Caller, asked: Asked) -> int:
        """The tokens of a request's prompt. Raises Refusal as `admit` does."""
        self.check_room(caller.tenant, 1)

        def counted() -> int:
            return len(asked.prompts(self.registry.choose(caller, asked.model).renderer)[0])

        return await self.host.think(counted, caller.tenant)

    def drop(self, reply: Reply) -> None:
        """End the completions of a reply that nobody waits for any more."""
        self._drop(reply.jobs)

    def _drop(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if job.end is None:
                self.host.cancel(job, Refusal(499, "client_left", "the client left"))

    def check_room(self, tenant: str, n: int) -> None:
        """Raise Refusal unless a tenant's completions may wait, or nothing is computed now.

        Args:
            tenant: the tenant.
            n: how many completions there are.
        """
        if why := self.host.ready:
            raise Refusal(503, "not_ready", why, retry_after=1)
        host, most, own = self.host, self.limits.queue, self.limits.tenant_queue
        for limit, found, what, code in (
            (most, host.waiting(), "wait", "queue_full"),
            (own, host.waiting(tenant), "wait", "tenant_queue_full"),
            (LEAVING * own, host.leaving(tenant), "end", "tenant_queue_full"),
        ):
            if found + n > limit:
                told = f"{found} completions {what} already, expected at most {limit} with these"
                raise Refusal(429, code, told, retry_after=host.seconds_to_wait)

    def _new_tokens(self, asked: Asked, prompt: Sequence[int]) -> int:
        length = self.host.engine.length
        if not prompt:
            raise wrong(asked.field, "found no tokens, expected at least one")
        left = length - len(prompt)
        new = left if asked.max_new_tokens is None else asked.max_new_tokens
        if new < 1 <= left:
            raise wrong("max_tokens", f"found {new}, expected 1 or more")
        if left < 1 or new > left:
            wanted = max(new, 1)  # the first words are those by which clients know this error
            told = (
                f"This model's maximum context length is {length} tokens. However, you requested"
                f" {len(prompt) + wanted} tokens ({len(prompt)} in the {asked.field}, {wanted} in"
                " the completion); shorten the one or ask for less of the other"
            )
            raise Refusal(400, "context_length_exceeded", told, asked.field)
        return new

    def _refusal(self, error: LorafoldError, asked: Asked, chosen: Chosen) -> Refusal:
        if why := self.host.ready:
            return Refusal(503, "not_ready", why, retry_after=1)
        told = str(error).partition(": ")[2]  # without the request's name
        if chosen.key and self.host.engine.adapters.status(chosen.key) == "quarantined":
            return Refusal(423, "adapter_quarantined", told, "model")
        field = told.partition(":")[0]
        named = FIELDS | {"prompt": asked.field}
        return Refusal(400, "invalid_value", told, field).sent_as(named)
