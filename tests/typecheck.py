"""The run-time checker of shapes and types: beartype, with int accepted where float is annotated, as PEP 484 has it."""

from beartype import BeartypeConf, beartype

checker = beartype(conf=BeartypeConf(is_pep484_tower=True))
