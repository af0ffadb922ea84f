"""Adapters on a model: what the user holds.

    adapter = lf.attach(model, lf.LoRA(rank=16), targets="all-linear", name="sft")
    adapter.save(path);  adapter = lf.load(model, path);  adapter.merge();  adapter.detach()
"""

from lorafold.adapter.attaching import attach, load, load_all
from lorafold.adapter.handle import Adapter
from lorafold.adapter.reference import reference
from lorafold.core.attach import only

__all__ = ["Adapter", "attach", "load", "load_all", "only", "reference"]
