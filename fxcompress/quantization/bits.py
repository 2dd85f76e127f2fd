"""How many bits each layer gets: ``weight_bits=`` and ``activation_bits=`` of every quantizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from fxcompress.errors import InputError
from fxcompress.select import last_matches, parsed_rules

Bits = int | Mapping[str, int]


@dataclass(frozen=True)
class BitRules:
    """What an option says, parsed.

    Attributes:
        role: the option's name.
        rules: (name pattern, bits); the last one that matches a layer counts, one that none matches stays float.
    """

    role: str
    rules: tuple[tuple[str, int], ...]

    @classmethod
    def parse(cls, role: str, value: Bits, least: int = 2) -> BitRules:
        """Read an option: an int for every layer, or a mapping of name pattern to int.

        Raises:
            InputError: a number of bits is not an integer from ``least`` to 8, or the mapping is empty.
            SelectionError: a key is no name pattern.
        """
        return cls(role, parsed_rules(role, value, partial(require_bits, least=least), "{'layer1.*': 8}"))

    def of(self, layers: Mapping[str, nn.Module]) -> dict[str, int]:
        """The bits of each layer that a rule matches.

        Raises:
            SelectionError: a pattern matches no layer.
        """
        return last_matches(self.role, self.rules, layers)


def require_bits(what: str, value: Any, least: int = 2) -> int:
    """The number of bits, which is an integer from ``least`` to 8, or an :class:`InputError`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 8:
        raise InputError(f"{what} is {value!r}; expected an integer from {least} to 8.")
    return value
