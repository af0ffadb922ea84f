"""Verification of untrusted adapter files and grammars in processes that can be killed.

    sandbox = checks.Sandbox(modules, tokenizer)
    sandbox.verify(path)                 the digests of an adapter's files (`adapter_files`)
    sandbox.open(contents)               its tokenizer, whose template renders in a process
    sandbox.compile(grammar)             whether a request's grammar can be compiled

Nested JSON may overflow a parser's stack, a pattern may backtrack for minutes, a template may loop
for ever or exhaust memory; each of these kills only its process. Later steps use only verified
bytes, identified by their digest.
"""
