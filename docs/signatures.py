"""Signatures of the reference as `help()` shows them: a function has the parameters that it shares
with others, and a type is shown without the declaration of its option.
"""

import inspect
import re
from typing import Annotated, Any, ForwardRef, get_args, get_origin

import griffe

import lorafold

MODULES = re.compile(r"\b(?:collections\.abc|pathlib|typing)\.")


def written(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        return written(get_args(hint)[0])
    if isinstance(hint, ForwardRef):
        return hint.__forward_arg__
    if isinstance(hint, str):
        return hint
    return MODULES.sub("", inspect.formatannotation(hint))


class Runtime(griffe.Extension):
    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Give a function of the API the parameters that it has once it is imported."""
        function = getattr(lorafold, func.name, None)
        if not func.path.startswith("lorafold.api.") or not inspect.isfunction(function):
            return
        func.parameters = griffe.Parameters(*[
            griffe.Parameter(
                one.name,
                annotation=written(one.annotation),
                kind=griffe.ParameterKind[one.kind.name.lower()],
                default=None if one.default is one.empty else repr(one.default),
            )
            for one in inspect.signature(function).parameters.values()
        ])
        if func.docstring:
            func.docstring.value = inspect.getdoc(function) or ""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        found = attr.annotation
        if isinstance(found, griffe.ExprSubscript) and str(found.left) == "Annotated":
            attr.annotation = found.slice.elements[0]  # type: ignore[union-attr]
