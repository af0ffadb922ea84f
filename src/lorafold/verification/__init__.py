"""Hostile until verified: what comes with an adapter, and grammars of requests, are read in
processes that can be killed.

    screen = Screen(modules, tokenizer)
    screen.verify(path)                 what its files are, by digest
    screen.open(contents)               its tokenizer, `Opened`, whose template renders in a process
    screen.compile(grammar)             whether a request's grammar can be compiled

    processes.py     the processes, their limits, and the messages to them
    worker.py        one process: it takes messages and imports no torch
    verifying.py     the files of an adapter, in a process
    templates.py     the tokenizers of adapters, in a process
    screen.py        what the server asks for
    opened.py        the tokenizer of an adapter, as the server has it

A schema or a configuration may be nested until a parser's stack ends, a pattern may backtrack for
minutes, a template may loop for ever or double a text until memory ends. Each of these ends a
process that nothing else depends on, and is told in one line. What was verified is named by the
digest of its bytes, and whoever uses it takes bytes of that digest alone.
"""
