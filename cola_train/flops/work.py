"""FLOPs, 2 per multiply-add, of what networks are made of: matrix products and attention.

All else (elementwise work, norms, softmax, rotary embedding, biases, losses, the optimizer) is not
counted.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Extent:
    """A count of positions, (query, key) pairs or times: those read, and those computed."""

    useful: int
    executed: int

    @classmethod
    def of(cls, count: int) -> "Extent":
        """Where all that is computed is useful."""
        return cls(count, count)

    def __mul__(self, times: int) -> "Extent":
        return Extent(self.useful * times, self.executed * times)


@dataclasses.dataclass(frozen=True)
class Linear:
    """A matrix that multiplies each position, or a convolution whose patches do not overlap."""

    inputs: int
    outputs: int


@dataclasses.dataclass(frozen=True)
class Backward:
    """Whether a network has a backward pass, and whether that recomputes the blocks' forward."""

    runs: bool
    recomputes_blocks: bool = False


NO_BACKWARD = Backward(runs=False)


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of some part, all exact."""

    model_forward: int = 0  # those whose result is read
    model_backward: int = 0  # of the gradients of these
    executed_forward: int = 0  # as computed: whole rectangles of pairs, unread results too
    executed_backward: int = 0  # of the gradients of these
    recomputation: int = 0  # what the backward pass computes a second time, as it is executed

    def __add__(self, other: "Work") -> "Work":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Work(*(mine + others for mine, others in pairs))

    def __mul__(self, times: int) -> "Work":
        return Work(*(flops * times for flops in dataclasses.astuple(self)))

    @property
    def model(self) -> int:
        """Useful FLOPs."""
        return self.model_forward + self.model_backward

    @property
    def executed(self) -> int:
        """FLOPs as executed, recomputation included."""
        return self.executed_forward + self.executed_backward + self.recomputation

    def computed_again(self) -> "Work":
        """This work with its forward pass computed again in the backward pass."""
        return dataclasses.replace(self, recomputation=self.recomputation + self.executed_forward)


Parts = dict[str, Work]
"""Work by part of the networks, such as "dit.attention"."""


def product(layer: Linear, at: Extent, backward: Backward, input_gradient: bool = True) -> Work:
    """A linear layer at some positions; each of its two gradients is a product of the same size."""
    per_position = 2 * layer.inputs * layer.outputs
    products = backward.runs * (1 + input_gradient)
    useful, executed = per_position * at.useful, per_position * at.executed
    return Work(useful, products * useful, executed, products * executed)


def attention(pairs: Extent, width: int, backward: Backward) -> Work:
    """Attention over (query, key) pairs; `width` is heads x head_dim.

    Forward: scores, and their product with the values. Backward: four products of that size
    (gradients of values, scores, queries and keys), and a fifth by which fused kernels compute the
    scores again instead of keeping them.
    """
    useful, executed = 2 * width * pairs.useful, 2 * width * pairs.executed
    if not backward.runs:
        return Work(2 * useful, 0, 2 * executed, 0)
    return Work(2 * useful, 4 * useful, 2 * executed, 4 * executed, recomputation=executed)
