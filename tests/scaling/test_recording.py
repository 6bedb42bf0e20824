"""The recording mode's fakes, against those of torch's own fake mode."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from cola_train.scaling.recording import RecordingMode

NORM = torch.ops.aten.native_layer_norm
NORM_BACKWARD = torch.ops.aten.native_layer_norm_backward
CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "view": lambda x, out: x.view(3, 8),
    "reshape of a copy": lambda x, out: x.t().reshape(-1),
    "detach": lambda x, out: x.detach(),
    "t": lambda x, out: x.t(),
    "transpose": lambda x, out: x.unsqueeze(1).transpose(0, 2),
    "unsqueeze": lambda x, out: x.unsqueeze(-1),
    "slice": lambda x, out: x[1:, ::2],
    "slice with keywords": lambda x, out: torch.ops.aten.slice.Tensor(x, dim=1, start=2, end=4),
    "as_strided": lambda x, out: x.as_strided((2, 2), (1, 5), 3),
    "mm": lambda x, out: x @ x.t(),
    "mm of bf16": lambda x, out: x.bfloat16() @ x.t().bfloat16(),
    "mm into": lambda x, out: torch.mm(x, x.t(), out=out),
    "addmm into": lambda x, out: torch.addmm(out, x, x.t(), out=out),
    "times a whole number": lambda x, out: x.int() * 2,
    "times a float": lambda x, out: x.int() * 2.0,
    "times a truth value": lambda x, out: (x > 0) * True,
    "times a transposed": lambda x, out: x[:4, :4].t() * out,
    "over broadcast shapes": lambda x, out: x[:, :1] + x[:1].double(),
    "in place": lambda x, out: out.add_(1),
    "sum": lambda x, out: x.sum(1, keepdim=True),
    "sum as another type": lambda x, out: x.sum(0, dtype=torch.float64),
    "cat": lambda x, out: torch.cat([x, x[:, :2]], dim=1),
    "cast": lambda x, out: x.to(torch.bfloat16),
    "like": lambda x, out: torch.zeros_like(x.t()),
    "where": lambda x, out: torch.where(x > 0, x, 0.0),
    "layer norm": lambda x, out: torch.nn.functional.layer_norm(x, (6,)),
    "layer norm's means": lambda x, out: NORM(x, (6,), None, None, 1e-5)[1],
    "layer norm's gradient": lambda x, out: NORM_BACKWARD(
        x, x, (6,), x[:, :1], x[:, :1], None, None, [True, False, False]
    )[0],
    "of a number": lambda x, out: torch.tensor(2.0).view(1),
    "of a number that was detached": lambda x, out: torch.tensor([1.0, 2.0]).detach()[1:],
}


@pytest.mark.parametrize("call", CALLS)
def test_a_fake_is_that_of_torchs_fake_mode(call: str) -> None:
    found = []
    for mode in (FakeTensorMode(), RecordingMode()):
        with mode:
            inputs = torch.empty(4, 6), torch.empty(4, 4)
            for _ in range(2):  # the second time it is known
                result = CALLS[call](*inputs)
            assert result.device.type == "cpu"
            storage = result.untyped_storage()
            of = [storage._cdata == tensor.untyped_storage()._cdata for tensor in inputs]
            found.append(
                {
                    "type": type(result),
                    "shape": result.shape,
                    "strides": (result.stride(), result.storage_offset()),
                    "dtype": (result.dtype, result.requires_grad),
                    "bytes": storage.nbytes(),
                    "storage of an input": of,
                }
            )
    assert found[0] == found[1]
