"""Verification of untrusted adapter files and grammars in worker processes that can be killed.

    sandbox = Sandbox(modules, tokenizer)
    sandbox.verify(path, ...)      returns the SHA-256 digests of the adapter's files
    sandbox.open(contents)         returns a tokenizer that renders in a worker process
    sandbox.compile(grammar)       raises if a request's grammar can't be compiled

Nested JSON may overflow a parser's stack, a regular expression may backtrack for minutes, and a
chat template may loop forever or exhaust memory. Any of these kills only the worker. After
verification, the server reads only bytes with the verified digests.
"""
