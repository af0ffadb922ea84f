"""The server: an OpenAI-compatible API over the engine, for many tenants and adapters on one base.

    run.py, app.py        from options to a listening process; what every request passes
    routes/, server.py    a file for each dialect or group of routes; what all routes share
    request_body.py       the bodies of requests and answers; schema.py: schemas for completions
    chat.py               the next turn of a conversation, in all dialects
    keys.py               API keys, tenants, token limits
    directory.py          which files may be read as adapters; verifier.py: and served
    registry.py           the names of adapters and aliases, and the state that outlives the process
    rendering.py          requests as tokens
    completion_job.py     a completion as the event loop sees it, and its parts
    host.py               limits, the queue, deadlines
    backend.py            the interface to an engine; engine_backend.py implements it

A request goes from a route through admission to the backend as a `Request` for each completion; its
events come back as `Token` and `Ended`.
"""
