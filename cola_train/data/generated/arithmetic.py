"""Sums: two whole numbers and what they come to, as 27+5=32."""

import random
import re

from cola_train.data.generated.language import Language

_NUMBER = "(0|[1-9][0-9]*)"
_FORM = re.compile(rf"{_NUMBER}\+{_NUMBER}=([0-9]+)")


def _write(draws: random.Random, most_bytes: int) -> str:
    """A sum of two numbers of 1 to (most_bytes - 3) // 3 digits each; lengths are as likely."""
    most_digits = (most_bytes - 3) // 3  # a result may have one more
    one, other = (_number(draws, draws.randint(1, most_digits)) for _ in range(2))
    return f"{one}+{other}={one + other}"


def _number(draws: random.Random, num_digits: int) -> int:
    least = 10 ** (num_digits - 1) if num_digits > 1 else 0
    return draws.randrange(least, 10**num_digits)


def _fault(text: str) -> str | None:
    form = _FORM.fullmatch(text)
    if form is None:
        return "is not of the form A+B=C"
    one, other, result = form.groups()
    return None if result == _added(one, other) else "has a wrong result"


def _added(one: str, other: str) -> str:
    """Two numbers added digit by digit: Python refuses to read one of thousands of digits."""
    width = max(len(one), len(other)) + 1
    digits, carry = "", 0
    for a, b in zip(reversed(one.zfill(width)), reversed(other.zfill(width))):
        carry, digit = divmod(int(a) + int(b) + carry, 10)
        digits = str(digit) + digits
    return digits.lstrip("0") or "0"


ARITHMETIC = Language(_write, _fault)
