"""Amounts of training: optimizer steps, tokens or EFLOPs (10^18 floating-point operations)."""

import dataclasses
import re
from fractions import Fraction
from typing import Literal, get_args

from cola_train.config.settings import UserError

FLOPS_PER_EFLOP = 10**18
Unit = Literal["steps", "tokens", "EFLOPs"]
_AMOUNT = re.compile(
    r"\s*(\d{1,30}\.?\d{0,30}(?:e[+-]?\d{1,2})?)\s*(steps?|tokens?|eflops?|)\s*", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class Amount:
    """A whole number of steps, tokens or FLOPs, exactly as it was written."""

    count: int  # EFLOPs are held as FLOPs
    unit: Unit

    @classmethod
    def parse(cls, text: str, key: str) -> "Amount":
        """From "5000", "5000 steps", "3.6e9 tokens" or "38.9 EFLOPs"; a bare number counts steps.

        Raises:
            UserError: anything else; steps or tokens that are not whole. `key` is named.
        """
        match = _AMOUNT.fullmatch(text)
        if match is None:
            raise UserError(
                f"{key} must be an amount such as '5000 steps', '3.6e9 tokens' or '38.9 EFLOPs', "
                f"not {text!r}."
            )
        # A bare number is of the first unit.
        units: tuple[Unit, ...] = get_args(Unit)
        unit = next(unit for unit in units if unit.lower().startswith(match[2].lower()))
        exact = Fraction(match[1]) * (FLOPS_PER_EFLOP if unit == "EFLOPs" else 1)
        if exact.denominator != 1:
            whole = "FLOPs" if unit == "EFLOPs" else unit
            raise UserError(f"{key} must be a whole number of {whole}, not {text!r}.")
        return cls(int(exact), unit)

    @classmethod
    def of_eflops(cls, eflops: float) -> "Amount":
        """The whole number of FLOPs, at least 1, nearest to so many EFLOPs as they are written.

        In binary 38.9 EFLOPs are no whole number, and a third of one is none in decimals.
        """
        return cls(max(1, round(Fraction(repr(eflops)) * FLOPS_PER_EFLOP)), "EFLOPs")

    def in_steps(self, tokens_per_step: int) -> int:
        """The fewest steps that reach it; not for EFLOPs, whose steps the networks decide."""
        assert self.unit != "EFLOPs"
        return self.count if self.unit == "steps" else -(-self.count // tokens_per_step)

    def __str__(self) -> str:
        if self.unit == "EFLOPs":
            return f"{self.count / FLOPS_PER_EFLOP:,.6g} EFLOPs"
        return f"{self.count:,} {self.unit}"


@dataclasses.dataclass(frozen=True)
class Mark:
    """A point of training at which something happens: once, or each time the amount recurs."""

    amount: Amount
    repeats: bool

    @classmethod
    def parse(cls, text: str, key: str) -> "Mark":
        """From an amount, or "every" and an amount.

        Raises:
            UserError: anything else, or nothing at all (0).
        """
        words = text.strip()
        repeats = words.lower().startswith("every ")
        amount = Amount.parse(words[len("every ") :] if repeats else words, key)
        if amount.count == 0:
            raise UserError(f"{key} must be above 0, not {text!r}.")
        return cls(amount, repeats)

    def passed(self, before: int, after: int) -> bool:
        """Whether a step that moved a counter of this unit from `before` to `after` reached it."""
        if self.repeats:
            return after // self.amount.count > before // self.amount.count
        return before < self.amount.count <= after
