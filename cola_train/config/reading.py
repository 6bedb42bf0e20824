"""Read YAML as text: what a value means is decided by its setting's type, not by its looks."""

import errno
import glob
from pathlib import Path
from typing import Any

import yaml

from cola_train.config.content import read_bytes
from cola_train.config.settings import UserError, nearest, require

# A hundred times what configs have; PyYAML needs seconds for it.
MOST_BYTES = 2**18
_TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ["null", "bool", "int", "float", "str", "timestamp", "value", "merge", "seq", "map"]
}


class Plain(str):
    """A value that stands without quotes, so that it may mean null, a number or a word."""

    def __repr__(self) -> str:
        return str(self) or "nothing"


def parse(text: str, origin: str) -> Any:
    """The YAML in `text` as dictionaries, lists and strings, those without quotes `Plain`.

    Nothing at all is `Plain("")`.

    Raises:
        UserError: no YAML, a key that stands twice, a tag, or nesting too deep; it names `origin`.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return Plain("") if node is None else _value(node, origin, {})
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        raise UserError(f"{origin} is not valid YAML: {error.problem}{where}.") from None
    except UserError:
        raise
    # PyYAML lets those of chr() through, for an escape that is no character.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError(f"{origin} is not valid YAML: {' '.join(str(error).split())}.") from None
    except RecursionError:
        raise UserError(
            f"{origin} is nested too deep: a config has sections in sections, and lists."
        ) from None


def read_text(path: Path) -> str:
    """The text of a config file, or what comes through a pipe, which can be read only once.

    Raises:
        UserError: no such file, one that is no text, longer than MOST_BYTES or a device; a pipe
            that nobody writes, or that does not end.
    """
    try:
        data = read_bytes(path, MOST_BYTES)
    except FileNotFoundError:
        raise UserError(f"There is no config file {path}; {_hint(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give a .yaml config file.") from None
    except OSError as error:
        too_long = f"{path} is longer than a config can be ({MOST_BYTES:,} bytes)"
        require(error.errno != errno.EFBIG, f"{too_long}; give a .yaml config file.")
        raise UserError(
            f"Cannot read the config file {str(path)!r}: {error.strerror}. Give a .yaml file that "
            "exists and may be read, or what writes one, as in <(command)."
        ) from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}); give a .yaml config file."
        ) from None


def _hint(path: Path) -> str:
    # A folder that does not exist has no files either.
    folder, name = path.parent, glob.escape(path.name)
    if found := [*folder.glob("*.yaml"), *folder.glob(f"*/{name}")]:
        return nearest(path.name, [p.relative_to(folder).as_posix() for p in found])
    return f"the folder {folder} has no .yaml file"


def _value(node: yaml.Node, origin: str, known: dict[int, Any]) -> Any:
    """`known` has the nodes that were read: aliases of one node stay one value."""
    if id(node) in known:
        return known[id(node)]
    require(
        node.tag in _TAGS,
        f"{origin}, line {_line(node)}: {node.tag} is a tag, which configs do not have; write the "
        "value alone.",
    )
    value: Any
    if isinstance(node, yaml.MappingNode):
        value = _mapping(node, origin, known)
    elif isinstance(node, yaml.SequenceNode):
        value = [_value(item, origin, known) for item in node.value]
    else:
        assert isinstance(node, yaml.ScalarNode)
        value = Plain(node.value) if node.style is None else node.value
    known[id(node)] = value
    return value


def _mapping(node: yaml.MappingNode, origin: str, known: dict[int, Any]) -> dict[str, Any]:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        place = f"{origin}, line {_line(key)}"
        require(isinstance(key, yaml.ScalarNode), f"{place}: a key must be a name.")
        require(
            key.value not in lines,
            f"{origin}: the key '{key.value}' stands twice (lines {lines.get(key.value)} and "
            f"{_line(key)}); leave one of them out.",
        )
        lines[key.value] = _line(key)
    # Puts what `<<` names before the node's own pairs, which so win.
    yaml.SafeLoader("").flatten_mapping(node)
    return {key.value: _value(item, origin, known) for key, item in node.value}


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
