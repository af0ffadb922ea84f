"""The server: an OpenAI-compatible API over the engine, for many tenants and adapters on one base.

    run.py, app.py        start-up and shutdown; middleware and limits of connections
    routes/, server.py    the routes by API; helpers of all routes
    request_body.py       bodies of requests; schema.py: JSON schemas of completions
    chat.py               the next turn of a conversation, for all APIs
    keys.py               API keys, tenants, token limits
    directory.py          the directory of adapters; verifier.py: their verification
    registry.py           names of adapters and aliases, and the state file
    rendering.py          chat templates and tokenization
    completion_job.py     one completion on the event loop, and its parsing
    host.py               admission, queue, deadlines
    backend.py            the interface to an engine, which engine_backend.py implements
"""
