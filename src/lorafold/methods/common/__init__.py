"""Code that several methods use: deltas for token rows, modules, biases and virtual tokens, and
checks of options.
"""
