"""Continuous batching: requests with any mixture of adapters share each pass, each as if alone."""

from lorafold.engine.engine import Engine
from lorafold.engine.request import Ended, EngineSettings, EventStream, Request, Sampling, Token

__all__ = ["Ended", "Engine", "EngineSettings", "EventStream", "Request", "Sampling", "Token"]
