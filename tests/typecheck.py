"""The run-time checker of shapes and types: beartype, with int accepted where float is annotated,
as PEP 484 has it.
"""

import ast
import functools
import inspect
import sys
from typing import Any

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checker(checked: Any) -> Any:
    """Check a function or class, but for annotations of names that its module imports for type
    checkers alone.

    These are not there at run time, so beartype could not look them up.
    """
    hints = getattr(checked, "__annotations__", {})
    absent = _absent_names(checked.__module__)
    for name, hint in list(hints.items()):
        if isinstance(hint, str) and absent & _names_in(hint):
            hints[name] = Any
    return _check(checked)


@functools.cache
def _absent_names(module: str) -> frozenset[str]:
    """What a module imports under `if TYPE_CHECKING:`."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    guarded = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    imports = [
        inner
        for node in guarded
        for inner in node.body
        if isinstance(inner, (ast.Import, ast.ImportFrom))
    ]
    return frozenset(alias.asname or alias.name for node in imports for alias in node.names)


def _names_in(hint: str) -> frozenset[str]:
    return frozenset(
        node.id for node in ast.walk(ast.parse(hint, mode="eval")) if isinstance(node, ast.Name)
    )
