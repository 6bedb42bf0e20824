"""Torch's fake mode, which tells a log about each operator, with a short way for most of them."""

import contextlib
import gc
import unittest.mock
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from cola_train.scaling.allocations import AllocationLog
from cola_train.scaling.layers import Section

_aten = torch.ops.aten
# Most of a step's calls, with the same fake: their meta kernel's result, on the first input's
# device. The fake mode comes to it on a way that takes several times as long.
_BY_META_KERNEL = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.detach.default,
    _aten.t.default,
    _aten.transpose.int,
    _aten.unsqueeze.default,
    _aten.slice.Tensor,
    _aten.as_strided.default,
    _aten.mm.default,
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
            if func in _BY_META_KERNEL and all(map(_is_plain, args)):
                with in_kernel_invocation_manager(self):
                    result = func(*args, **kwargs or {})
                result = FakeTensor(self, result, args[0].fake_device)
            elif func in _WRITES_TO_OUT:
                result = kwargs["out"]
            else:
                result = self.dispatch(func, types, args, kwargs or {})
        finally:
            self._depth -= 1
        if self._log is not None and self._depth == 0:
            self._log.saw(func, args, kwargs, result)
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


def _is_plain(argument: object) -> bool:
    """Not a tensor that the fake mode must make a fake of, or whose values it knows."""
    if isinstance(argument, Tensor):
        return type(argument) is FakeTensor and argument.constant is None
    return True
