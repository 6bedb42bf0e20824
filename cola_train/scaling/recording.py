"""Torch's fake mode, which tells a log about each operator, with a short way for most of them."""

import contextlib
import functools
import gc
import unittest.mock
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
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
        # By call, a function for each new tensor that it gives. The fake mode remembers calls too,
        # by much of which nothing here differs, such as a tensor's layout.
        self._results: dict[Hashable, list[Callable[[], FakeTensor | None]]] = {}

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
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        key = _key(func, args, kwargs)
        if key in self._results:
            known = [make() for make in self._results[key]]
            return known[0] if len(known) == 1 else tuple(known)
        result: Any = self.dispatch(func, types, args, kwargs)
        if key is not None:
            results: Sequence[Any] = [result] if isinstance(result, Tensor) else result
            if all(map(_is_plain, results)):
                self._results[key] = [self._like(one) for one in results]
        return result

    def _like(self, tensor: FakeTensor | None) -> Callable[[], FakeTensor | None]:
        if tensor is None:
            return lambda: None
        shape, strides, dtype = tensor.shape, tensor.stride(), tensor.dtype
        device = tensor.fake_device

        def make() -> FakeTensor:
            on_meta = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
            return FakeTensor(self, on_meta, device)

        return make

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
    """What the results of a call depend on; None where they are not new tensors for sure."""
    if not _gives_new_tensors(func):
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
def _gives_new_tensors(func: Any) -> bool:
    schema = func._schema
    tensors = {str(value.type) for value in schema.returns} == {"Tensor"}
    aliases = any(value.alias_info is not None for value in schema.arguments)
    # Views among them say that they alias nothing, and do.
    return func.namespace == "aten" and tensors and not aliases and func not in _VIEWS


def _is_plain(argument: object) -> bool:
    """Not a tensor that the fake mode must make a fake of, or whose values it knows."""
    if isinstance(argument, Tensor):
        return type(argument) is FakeTensor and argument.constant is None
    return True
