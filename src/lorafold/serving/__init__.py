"""The server: an OpenAI-compatible API over the engine, for many tenants and adapters on one base.

    run.py           from options to a listening process, and its orderly end
    app.py           the application: what every request passes, how long it may take to arrive and
                     how large it may be; what keeps a server running asks
    routes/          one file a dialect or a group of routes: what is asked, what is answered
    server.py        what all routes do: who calls, what was asked, what came of it
    body.py          how bodies of requests are read, and what the bodies of answers share
    schema.py        JSON schemas that a completion has to fit
    keys.py          who calls, which adapters they may use, and how many tokens they were given
    directory.py     which files may be read as adapters
    verifier.py      whether they may be served, and what is known of those that were verified once
    registry.py      which names stand for which adapters, and what of that outlives the process
    rendering.py     requests as tokens, by the tokenizer of the base or the adapter
    next_turn.py     the next turn of a conversation: what is asked for, and what is said
    job.py           a request between its dialect and the engine; a completion as the event loop
                     sees it, told apart in reasoning, content and calls; a reply of several
    host.py          what is computed, as the event loop has it; limits, the queue
    backend.py       what computes: nine calls, and the words that pass through them
    in_process.py    the one backend: the engine in a thread of its own
    settings.py, refusal.py, metrics.py, logs.py, page/

    choose -> render -> Prompted -> admit -> Reply

A request goes from a route through admission to the backend as a `Request` for each completion; its
events come back as `Token` and `Ended`. No other words pass between HTTP and the engine. Another
engine is another file like `in_process.py`: a subclass of `Backend`, which `run.server_of` opens.
"""
