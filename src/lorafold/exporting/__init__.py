"""Exports of adapters and models for other engines, each verified in the engine it is for.
`run.export` has the order, `run.TARGETS` the targets; `engines/` runs in the engines' own
processes.
"""
