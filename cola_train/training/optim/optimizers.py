"""The optimizer over a run's networks: AdamW, or Muon over the matrices of blocks beside it."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from cola_train.config.optim import OptimConfig
from cola_train.models.blocks import Block, stacked_matrices, time_parameters
from cola_train.objectives.objective import Objective

# The quintic a x + b x^3 + c x^5 (Jordan et al., 2024) is steepest at 0: small singular values grow
# fastest.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7
_Kinds = dict[tuple[float, int], list[Tensor]]  # by learning-rate factor and matrices in each


def muon_matrices(objective: nn.Module) -> dict[str, int]:
    """The names of the parameters that Muon is for, and how many matrices each one stacks.

    They are the matrices of blocks, which read and write features of the residual stream. Not
    embeddings, vocabulary heads and what reads or writes latents (Jordan et al., 2024: hidden
    matrices alone). Not adaLN's: their input depends on t alone, so their gradients have a handful
    of directions, and an update that is as large in all others moves the network by noise.
    """
    once_per_time, stacks = time_parameters(objective), stacked_matrices(objective)
    return {
        f"{path}.{name}": stacks.get(id(parameter), 1)
        for path, block in objective.named_modules()
        if isinstance(block, Block)
        for name, parameter in block.named_parameters()
        if parameter.ndim == 2 and id(parameter) not in once_per_time
    }


def orthogonalized(
    matrix: Float[Tensor, "rows columns"], iterations: int, products: torch.dtype = torch.bfloat16
) -> Float[Tensor, "rows columns"]:
    """About U V^T of a matrix U S V^T, as `products`: its singular values are some 0.7 to 1.2.

    By Newton-Schulz iterations, which converge to no fixed value but need few to get there.
    """
    a, b, c = _QUINTIC
    x = matrix.to(products)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class WholeMatrixMuon(torch.optim.Muon):
    """torch's Muon over sharded matrices, with updates as large as AdamW's (Liu et al., 2025, 2.2).

    A group's "matrices" says how many of them each of its parameters stacks. Every process
    orthogonalizes every matrix whole. torch's own would multiply shards and add up their products
    in bf16, and so compute something else on each number of processes. `products` is what matrices
    are multiplied in: a CPU without bf16 takes 10 times as long to emulate torch's.
    """

    def __init__(
        self, groups: list[dict[str, Any]], config: OptimConfig, products: torch.dtype
    ) -> None:
        super().__init__(
            groups,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            momentum=config.muon_momentum,
            nesterov=config.muon_nesterov,
            ns_steps=config.muon_iterations,
            adjust_lr_fn="match_rms_adamw",
        )
        self._products = products

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # MuonWithAdamW calls the closure
        """One step; a collective call."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        matrices = group["matrices"]
        update = self._over_shards(direction, matrices, group["ns_steps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        # An orthogonal matrix has entries of root mean square 1 / sqrt(max(rows, columns)), AdamW's
        # updates of some 0.2 to 0.4.
        rows, columns = parameter.shape
        size = 0.2 * math.sqrt(max(rows // matrices, columns))
        parameter.add_(update, alpha=-group["lr"] * size)

    def _each_orthogonalized(self, stack: Tensor, matrices: int, iterations: int) -> Tensor:
        parts = stack.unflatten(0, (matrices, -1))
        return torch.cat([orthogonalized(each, iterations, self._products) for each in parts])

    def _over_shards(self, direction: Tensor, matrices: int, iterations: int) -> Tensor:
        """Each of the whole's matrices orthogonalized, sharded as they were."""
        if not isinstance(direction, DTensor):
            return self._each_orthogonalized(direction, matrices, iterations)
        # Offloaded shards are in the host's memory, and gathered on the mesh's devices; as what is
        # computed in.
        mesh, placements = direction.device_mesh, direction.placements
        whole = direction.to(mesh.device_type, self._products)
        assert isinstance(whole, DTensor)
        update = self._each_orthogonalized(whole.full_tensor(), matrices, iterations)
        # Every process has the same whole: nothing is sent.
        shards = distribute_tensor(update, mesh, placements, src_data_rank=None)
        return shards.to(direction.device)


class MuonWithAdamW(torch.optim.Optimizer):
    """Both as one to the rest of the program: one list of groups, one state by parameter."""

    def __init__(self, muon: WholeMatrixMuon, adamw: torch.optim.AdamW) -> None:
        # The groups are the parts' own objects: a learning rate that is set here is set there.
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._muon, self._adamw = muon, adamw
        shared: defaultdict[Tensor, Any] = defaultdict(dict)
        self.state = muon.state = adamw.state = shared

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both; a collective call."""
        loss = self._adamw.step(closure)
        self._muon.step()
        return loss


def build_optimizer(
    objective: Objective, config: OptimConfig, products: torch.dtype = torch.bfloat16
) -> torch.optim.Optimizer:
    """AdamW for every parameter, or Muon for what `muon_matrices` names and AdamW for the rest.

    `products` is what Muon multiplies in, which is bf16 unless the run is in fp32. Each group has
    its parameters' factor on the schedule as `learning_rate_factor`. Weight decay applies to every
    parameter: the paper names no exemption.
    """
    matrices = muon_matrices(objective) if config.optimizer == "muon" else {}
    by_muon, by_adamw = _Kinds(), _Kinds()
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            groups = by_muon if name in matrices else by_adamw
            kind = objective.learning_rate_factor(name), matrices.get(name, 1)
            groups.setdefault(kind, []).append(parameter)
    adamw = torch.optim.AdamW(
        _groups(by_adamw),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    if not by_muon:
        return adamw
    return MuonWithAdamW(WholeMatrixMuon(_groups(by_muon), config, products), adamw)


def _groups(kinds: _Kinds) -> list[dict[str, Any]]:
    return [
        {"params": group, "learning_rate_factor": factor, "matrices": matrices}
        for (factor, matrices), group in kinds.items()
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's learning rate to its factor times `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["learning_rate_factor"]


def ensure_state(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Tensor]]:
    """What the optimizer keeps of each parameter, made now and not at its first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if optimizer.state[parameter]:
                continue
            if "momentum" in group:
                state = {"momentum_buffer": torch.zeros_like(parameter)}
            else:
                state = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
            optimizer.state[parameter] = state
    return dict(optimizer.state)
