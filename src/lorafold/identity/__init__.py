"""What a thing is, as one digest: a model, an adapter, a stack of them, the code that makes it."""

from lorafold.identity.code import of_code
from lorafold.identity.things import joined, of_adapter, of_model, of_stack

__all__ = ["joined", "of_adapter", "of_code", "of_model", "of_stack"]
