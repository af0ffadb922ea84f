"""Continuous batching of requests with any mixture of adapters. Results are batch invariant."""

from lorafold.engine.engine import Engine
from lorafold.engine.request import Ended, EngineSettings, EventStream, Request, Sampling, Token

__all__ = ["Ended", "Engine", "EngineSettings", "EventStream", "Request", "Sampling", "Token"]
