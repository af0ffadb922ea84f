"""Adapters and models for other engines, each proved in the engine that it is for.

    update -> check -> write -> prove          nothing is written that the target can't say

`run.export` has the order, `run.TARGETS` the targets, `engines/` what runs in the engines' own
processes.
"""
