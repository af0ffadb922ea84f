"""Adapters' files and requests' grammars are untrusted: they are read in processes that can be
killed (`worker_pool`, `worker`).

    sandbox = checks.Sandbox(modules, tokenizer)
    sandbox.verify(path)                 the digests of an adapter's files (`adapter_files`)
    sandbox.open(contents)               its tokenizer, whose template renders in a process
    sandbox.compile(grammar)             whether a request's grammar can be compiled

A schema or a configuration may be nested until a parser's stack ends, a pattern may backtrack for
minutes, a template may loop for ever or double a text until memory ends. Each of these ends a
process that nothing else depends on. Verified bytes have a digest, and only these are used.
"""
