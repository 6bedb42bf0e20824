"""Torch's fake mode, which tells a log about each operator, with a short way for most of them."""

import contextlib
import functools
import gc
import unittest.mock
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from cola_train.scaling.allocations import AllocationLog
from cola_train.scaling.layers import Section

_aten = torch.ops.aten
# Half of a step's calls, whose fake is their meta kernel's result on the first input's device. The
# fake mode comes to it on a way that takes several times as long.
_VIEWS = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.detach.default,
    _aten.t.default,
    _aten.transpose.int,
    _aten.unsqueeze.default,
    _aten.slice.Tensor,
    _aten.as_strided.default,
}
_WRITES_TO_OUT = {_aten.mm.out, _aten.addmm.out}


class RecordingMode(FakeTensorMode):
    """A fake mode that tells a log about each operator.

    `FakeTensorMode` and `fake_device` are torch's private API, used by its compiler: tensors with
    storages of the right size and no memory. Nothing public gives these.
    """

    def __init__(self) -> None:
        # Weights come from the meta device.
        super().__init__(allow_non_fake_inputs=True)
        self._log: AllocationLog | None = None
        self._depth = 0
        # Of calls with new results: device, shape, strides and type. The fake mode remembers them
        # too, by much of which nothing here differs, such as a tensor's layout.
        self._results: dict[Hashable, tuple[torch.device, torch.Size, tuple[int, ...], Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, and the guard against it costs every call some microseconds.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            # Half of all calls: FSDP2 asks each parameter. The fake mode's own answer takes ten
            # times as long.
            return args[0].fake_device
        # The fake of an operator may call others, which the real one does not.
        self._depth += 1
        try:
            result = self._fake(func, types, args, kwargs or {})
        finally:
            self._depth -= 1
        if self._log is not None and self._depth == 0:
            self._log.saw(func, args, kwargs, result)
        return result

    def _fake(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """What the fake mode's `dispatch` gives, by shorter ways where there are."""
        if func in _WRITES_TO_OUT:
            return kwargs["out"]
        if func in _VIEWS and all(map(_is_plain, args)):
            with in_kernel_invocation_manager(self):
                view = func(*args, **kwargs)
            return FakeTensor(self, view, args[0].fake_device)
        key = _key(func, args, kwargs)
        if key in self._results:
            device, *known, dtype = self._results[key]
            return FakeTensor(self, torch.empty_strided(*known, dtype=dtype, device="meta"), device)
        result = self.dispatch(func, types, args, kwargs)
        if key is not None and type(result) is FakeTensor and result.constant is None:
            about = result.fake_device, result.shape, result.stride(), result.dtype
            self._results[key] = about
        return result

    def enter(self, section: Section, layer: int) -> None:
        """Tell the log, if there is one, that a layer's part of a section begins."""
        if self._log is not None:
            self._log.enter(section, layer)

    @contextlib.contextmanager
    def recording_to(self, log: AllocationLog) -> Iterator[None]:
        """Run the block with fake tensors, and tell `log` about each operator."""
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            log.resized(storage)
            return result

        self._log = log
        # What the garbage collector alone finds would be released at another moment each time.
        gc.disable()
        try:
            # FSDP2 empties and fills storages by this method, which no dispatch mode sees.
            with unittest.mock.patch.object(torch.UntypedStorage, "resize_", resize_), self:
                yield
        finally:
            gc.enable()
            log.close()
            self._log = None


def _key(func: Any, args: Sequence[object], kwargs: Mapping[str, object]) -> Hashable:
    """What the result of a call depends on; None where it is not one new tensor for sure."""
    if not _gives_a_new_tensor(func):
        return None
    parts: list[Any] = [func]
    for name, value in (*enumerate(args), *kwargs.items()):
        # 1, 1.0 and True are equal, and give results of different types.
        parts += [name, type(value)]
        if isinstance(value, FakeTensor) and value.constant is None:
            parts += [value.shape, value.stride(), value.dtype, value.fake_device]
        elif isinstance(value, list) and not any(isinstance(item, Tensor) for item in value):
            parts += value
        elif isinstance(value, (Tensor, list)):
            return None
        else:
            parts.append(value)
    return tuple(parts)


@functools.cache
def _gives_a_new_tensor(func: Any) -> bool:
    if func.namespace != "aten":
        return False
    schema = func._schema
    returns_one = [str(value.type) for value in schema.returns] == ["Tensor"]
    aliases = any(value.alias_info is not None for value in schema.arguments)
    # These say that they alias nothing, and do.
    return returns_one and not aliases and func not in _VIEWS


def _is_plain(argument: object) -> bool:
    """Not a tensor that the fake mode must make a fake of, or whose values it knows."""
    if isinstance(argument, Tensor):
        return type(argument) is FakeTensor and argument.constant is None
    return True
