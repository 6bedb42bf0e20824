"""What the networks' configs share: their config.json, whose fields are refused by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from cola_train.config.settings import Settings, UserError, nearest, require

Network = TypeVar("Network", bound="NetworkConfig")

# Written by the libraries that saved a checkpoint, of no consequence to the arithmetic.
_IGNORED_JSON_FIELDS = frozenset(
    {"architectures", "model_type", "dtype", "torch_dtype", "transformers_version"}
)


def _fits(value: Any, allowed: Any) -> bool:
    """Whether a JSON value is of a field's type: true is no number, 5 is a float as well."""
    if isinstance(value, bool):
        return allowed is bool
    if get_origin(allowed) is Literal:
        return value in get_args(allowed)
    return isinstance(value, allowed) or (isinstance(value, int) and isinstance(0.0, allowed))


@dataclasses.dataclass(frozen=True)
class NetworkConfig(Settings):
    """What the configs share: reading, checking and writing config.json."""

    @classmethod
    def from_json(cls: type[Network], fields: Mapping[str, Any], origin: str) -> Network:
        """Build from a config.json's fields; absent ones take the format's defaults."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        given = {name: value for name, value in fields.items() if name not in _IGNORED_JSON_FIELDS}
        for name, value in given.items():
            if name not in known:
                raise UserError(f"{origin}: unknown field '{name}'; {nearest(name, known)}")
            allowed = known[name].type
            wrong_type = f"field '{name}' must be of type {allowed}, not {value!r}."
            require(_fits(value, allowed), f"{origin}: {wrong_type}")
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        """The fields as config.json carries them."""
        return dataclasses.asdict(self)

    @property
    def num_blocks(self) -> int:
        """Blocks of all its stacks."""
        raise NotImplementedError

    def _supports(self, name: str, value: Any, why: str) -> None:
        given = getattr(self, name)
        require(
            given == value,
            f"{type(self).__name__}.{name} = {given!r} is not supported: {why}. Use {value!r}.",
        )
