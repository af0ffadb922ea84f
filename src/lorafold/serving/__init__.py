"""The server: an OpenAI-compatible API over the engine, for many tenants and adapters on one base.

    run.py           from options to a listening process, and its orderly end
    app.py           the application: what every request passes, and the routes
    routes/          one file a group of routes: what is asked, what is answered
    wire/            the types of requests, and the shapes of answers
    keys.py          who calls, and which adapters they may use
    registry.py      the adapters of a directory: verified, known, quarantined; their aliases
    desk.py          admission: limits, the queue, the request to the engine
    host.py          the engine's thread: events to the event loop, deadlines, restart
    metrics.py, logs.py, settings.py, page/

A request goes from a route through the desk to the host's engine, as `lorafold.engine.Request`; its
events come back as `Token` and `Ended`. No other words pass between HTTP and the engine.
"""
