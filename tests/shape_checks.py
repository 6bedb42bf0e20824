"""What tests check at every call: the shapes and types of functions whose annotations give shapes.

All other annotations are mypy's. Importing this module makes `cola_train` be imported with its
functions checked, so it comes before all else (tests/conftest.py).
"""

import ast
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype

PACKAGE = "cola_train"
# int is accepted where float is annotated, as PEP 484 has it.
_check_types = beartype(conf=BeartypeConf(is_pep484_tower=True))
_DECORATOR = "__import__('tests.shape_checks').shape_checks.checked"


def checked(definition: Any) -> Any:
    """Check the arguments and result of a function, or a dataclass' fields, if shapes are among
    their annotations.
    """
    if not isinstance(definition, type):
        return _checked(definition)
    if dataclasses.is_dataclass(definition) and "__init__" in vars(definition):
        setattr(definition, "__init__", _checked(definition.__init__))  # noqa: B010
    return definition


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    hints = function.__annotations__
    if not any(map(_has_shape, hints.values())):
        return function
    # What its module imports for type checkers alone is not there to be looked up.
    absent = _absent_names(function.__module__)
    for name, hint in list(hints.items()):
        if isinstance(hint, str) and absent & _names_in(hint):
            hints[name] = Any
    with_checks = _check_types(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        with jaxtyping.jaxtyped("context"):  # a name of a dimension means one size
            return with_checks(*args, **kwargs)

    return call


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    parts = [part for arg in get_args(hint) for part in (arg if isinstance(arg, list) else [arg])]
    return any(map(_has_shape, parts))


class _Loader(SourceFileLoader):
    """Compiles a module anew, `checked` around its classes and the functions of both."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path), path)
        bodies: list[Sequence[ast.stmt]] = [tree.body]
        while bodies:
            for node in bodies.pop():
                if not isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                    continue
                decorator = ast.parse(_DECORATOR, mode="eval").body
                # A class as `@dataclass` made it, a function as it was written.
                first = isinstance(node, ast.ClassDef)
                node.decorator_list.insert(0 if first else len(node.decorator_list), decorator)
                if isinstance(node, ast.ClassDef):
                    bodies.append(node.body)
        code: CodeType = compile(ast.fix_missing_locations(tree), path, "exec")
        return code


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


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


if any(name.partition(".")[0] == PACKAGE for name in sys.modules):
    raise RuntimeError(f"{PACKAGE} was imported before its shapes could be checked")
sys.meta_path.insert(0, _Finder())
