"""Tests of cola_train. `tests.checker` is what pytest checks every annotated shape with
(pyproject.toml).
"""

from tests.typecheck import checker

__all__ = ["checker"]
