"""Adapters on a model: attaching, loading, saving, merging and detaching."""

from lorafold.adapter.attaching import attach, load, load_all
from lorafold.adapter.handle import Adapter
from lorafold.adapter.reference import reference
from lorafold.core.attach import only

__all__ = ["Adapter", "attach", "load", "load_all", "only", "reference"]
