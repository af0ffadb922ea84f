"""Verification of untrusted adapter files and grammars in processes that can be killed.

    sandbox = Sandbox(modules, tokenizer)
    sandbox.verify(path)                 the SHA-256 digests of the adapter's files
    sandbox.open(contents)               its tokenizer; the template renders in a worker process
    sandbox.compile(grammar)             whether a request's grammar can be compiled

Nested JSON may overflow a parser's stack, a pattern may backtrack for minutes, a template may loop
for ever or exhaust memory; each of these kills only the worker. Later steps use only verified
bytes, identified by their digest.
"""
