"""The server: an OpenAI-compatible API over the engine, for many tenants and adapters on one base.

    run.py           from options to a listening process, and its orderly end
    arrival.py       requests as they arrive: their deadline and their size
    app.py           the application: what every request passes, and the routes
    routes/          one file a group of routes: what is asked, what is answered
    wire/            the types of requests, and the shapes of answers
    server.py        what all routes do: who calls, what was asked, what came of it
    keys.py          who calls, and which adapters they may use
    digests.py       which digests stand for which version
    directory.py     which files may be read as adapters
    registry.py      which names stand for which adapters
    state_file.py    what outlives the process: aliases, pins, quarantines
    renderers.py     requests as tokens, by the tokenizer of the base or the adapter (rendering.py)
    prompted.py      a request between its dialect and the engine, as a value
    admission.py     limits, the queue; choose, render and submit
    backend.py       what computes: nine calls; in_process.py is the engine in a thread of its own
    host.py          what is computed, as the event loop has it: jobs, deadlines, threads beside it
    job.py           a completion as the event loop sees it, and a reply of several
    next_turn.py     the next turn of a conversation; parts.py tells reasoning, content and calls
                     apart, shortened.py leaves the oldest out
    refusal.py, metrics.py, logs.py, settings.py, page/

    choose -> render -> Prompted -> admit -> Reply

A request goes from a route through admission to the backend as a `Request` for each completion; its
events come back as `Token` and `Ended`. No other words pass between HTTP and the engine.
"""
