"""What may become of what a file says: values of JSON, headers of safetensors files, YAML."""

import copy
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.mutations.changes import Change, change_bytes, written

# What may stand where something else was.
FOREIGN: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    2**31,
    2**63,
    10**300,
    "",
    "x",
    "\x00",
    "\ud800",
    "../../../etc/passwd",
    "/dev/zero",
    "x" * 5000,
    [],
    {},
    [None],
    [[1, 2], {"a": []}],
    {"a": {"b": 1}},
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a value of JSON there is another."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, inner in items:
        found.append((*path, key))
        if isinstance(inner, dict | list):
            # Long lists are alike inside.
            few = inner if isinstance(inner, dict) or len(inner) < 8 else inner[:8]
            found += _places(few, (*path, key))
    return found


def changed_value(value: Any, draw: random.Random) -> Any:
    """A value of JSON with something in it removed, renamed, swapped, added or of another kind."""
    value = copy.deepcopy(value)
    places = _places(value) if isinstance(value, dict | list) else []
    if not places:
        return draw.choice(FOREIGN)
    *outer, key = draw.choice(places)
    holder = value
    for name in outer:
        holder = holder[name]
    kind = draw.choice(["foreign", "foreign", "foreign", "gone", "other", "more", "nested"])
    if kind == "foreign":
        holder[key] = draw.choice(FOREIGN)
    elif kind == "gone":
        del holder[key]
    elif kind == "other":  # the value of another place
        source = value
        for name in draw.choice(places):
            source = source[name]
        holder[key] = copy.deepcopy(source)
    elif kind == "more":
        if isinstance(holder, dict):
            holder["unknown" if draw.random() < 0.5 else f"{key} "] = draw.choice(FOREIGN)
        else:
            holder.append(draw.choice(FOREIGN))
    else:
        for _ in range(draw.choice([3, 300])):
            holder[key] = [holder[key]]
    return value


def _json(path: Path, draw: random.Random) -> None:
    """Something in a JSON file, or in a line of one of lines."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        path.write_text(json.dumps(changed_value(json.loads(text), draw)))
        return
    lines = text.splitlines()
    place = draw.randrange(len(lines))
    lines[place] = json.dumps(changed_value(json.loads(lines[place]), draw))
    path.write_text("".join(line + "\n" for line in lines))


JSON: dict[str, Change] = {"something in the JSON": _json}


def safetensors_parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what follows it."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _header(change: Callable[[dict[str, Any], random.Random], Any]) -> Change:
    def apply(path: Path, draw: random.Random) -> None:
        header, body = safetensors_parts(path.read_bytes())
        text = json.dumps(change(header, draw)).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)

    return apply


def _some_tensor(**fields: Any) -> Change:
    def change(header: dict[str, Any], draw: random.Random) -> dict[str, Any]:
        header[draw.choice([name for name in header if name != "__metadata__"])].update(fields)
        return header

    return _header(change)


def _header_size(size: int) -> Change:
    return change_bytes(lambda data, draw: struct.pack("<Q", size) + data[8:])


def _not_finite(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    _, body = safetensors_parts(data)
    place = len(data) - len(body) + 4 * draw.randrange(len(body) // 4)
    bad = draw.choice([float("nan"), float("inf"), -float("inf")])
    path.write_bytes(data[:place] + struct.pack("<f", bad) + data[place + 4 :])


def _more_tensors(header: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    first = next(name for name in header if name != "__metadata__")
    return {**header, "another.tensor": header[first]}


def _fewer_tensors(header: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    del header[draw.choice([name for name in header if name != "__metadata__"])]
    return header


SAFETENSORS: dict[str, Change] = {
    "a header of 2^63 bytes": _header_size(2**63),
    "a header of 2^64 - 1 bytes": _header_size(2**64 - 1),
    "a header of 90 MB": _header_size(90_000_000),
    "a header of 0 bytes": _header_size(0),
    "a header of one byte": _header_size(1),
    "a tensor of 2^80 values": _some_tensor(shape=[2**40, 2**40]),
    "a tensor of 2^62 values": _some_tensor(shape=[2**62]),
    "a tensor of negative shape": _some_tensor(shape=[-1]),
    "a tensor of no shape": _some_tensor(shape=[]),
    "a tensor beyond the file": _some_tensor(data_offsets=[0, 2**40]),
    "a tensor that ends before it begins": _some_tensor(data_offsets=[64, 0]),
    "a tensor at no place": _some_tensor(data_offsets=None),
    "a tensor of integers": _some_tensor(dtype="I32"),
    "a tensor of no type": _some_tensor(dtype="F128"),
    "something in the header": _header(changed_value),
    "a tensor more": _header(_more_tensors),
    "a tensor less": _header(_fewer_tensors),
    "a value that is not finite": _not_finite,
}


def _yaml(*texts: str) -> dict[str, Change]:
    return {f"YAML: {text[:40]!r}": written(text.encode()) for text in texts}


def _with_line(line: str) -> Change:
    def change(data: bytearray, draw: random.Random) -> bytes:
        lines = bytes(data).decode().split("\n")
        tops = [place for place, text in enumerate(lines) if not text.startswith(" ")]
        lines.insert(draw.choice(tops), line)
        return "\n".join(lines).encode()

    return change_bytes(change)


def _line_value(value: str) -> Change:
    def change(data: bytearray, draw: random.Random) -> bytes:
        lines = bytes(data).decode().split("\n")
        place = draw.choice([n for n, text in enumerate(lines) if ": " in text])
        lines[place] = lines[place].partition(": ")[0] + f": {value}"
        return "\n".join(lines).encode()

    return change_bytes(change)


_BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)
)
YAML: dict[str, Change] = {
    **_yaml(
        "!!python/object/apply:os.system [echo]\n",
        "name: !!binary aGVsbG8=\n",
        "- a\n- b\n",
        "? [a, b]\n: c\n",
        "a: *nowhere\n",
        "a: &a [*a]\n",
        "a: &a {b: *a}\n",
        "<<: 5\n",
        "<<: [1, 2]\n",
        "--- 1\n--- 2\n",
        "%YAML 9.9\n---\nname: x\n",
        'name: "\\ud800"\n',
        'name: "\\U99999999"\n',
        "\tname: x\n",
        "name: x\nname: y\n",
        "base: /dev/zero\n",
        "base: .\n",
        "base: [a, b]\n",
        "base: given.yaml\n",
        "name: {a: {b: {c: d}}}\n",
        "{" * 3000,
        _BOMB,
        "name: ${oc.env:HOME}\n",
        "a.b.c: 1\n",
        "1: 2\n",
        "null: 2\n",
        "name: |\n" + "  x\n" * 60_000,
    ),
    **{
        f"a value becomes {value[:30]!r}": _line_value(value)
        for value in (
            *("null", "[]", "{}", "-1", "1e308", "1e999999", ".inf", ".nan", "0x10", "1_0", "07"),
            *("9" * 5000, "'1'", "1.5", "yes", "???", "${x}", "!!int 5", "[[[]]]", "'\\0'", "2"),
        )
    },
    **{
        f"a line more: {line[:30]!r}": _with_line(line)
        for line in ("unknown: 1", "base: ../../../etc/passwd", "stage: nothing", "}", "# fine")
    },
}
