"""How much of the dense model may be left."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields

from fxcompress.errors import InputError


@dataclass(frozen=True)
class Budget:
    """What a model may cost once it is compressed, as ratios of what the caller's dense model costs.

    One figure or several, of which each has to be met.

    Args:
        params: elements of the parameters.
        macs: multiply-accumulates per sample.
        bytes: size of parameters and buffers.
        latency: the time of a forward pass, measured on this machine.

    Raises:
        InputError: no figure is given, or one is not in (0, 1].
    """

    params: float | None = None
    macs: float | None = None
    bytes: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self)]
        if not self.ratios:
            raise InputError(
                f"the budget is empty; expected at least one of {', '.join(names)}, such as Budget(macs=0.5)."
            )
        for name, ratio in self.ratios.items():
            if isinstance(ratio, bool) or not isinstance(ratio, numbers.Real):
                raise InputError(
                    f"{name} is {ratio!r}, a {type(ratio).__name__}; expected a fraction of the dense model."
                )
            if not math.isfinite(ratio) or not 0 < ratio <= 1:
                raise InputError(
                    f"{name} is {ratio}; expected a fraction of the dense model in (0, 1], such as 0.5 for half of it."
                )
            object.__setattr__(self, name, float(ratio))  # of NumPy's numbers too

    @property
    def ratios(self) -> Mapping[str, float]:
        """The figures that are given, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: ratio for name, ratio in found.items() if ratio is not None}

    def __str__(self) -> str:
        return ", ".join(f"{ratio:.1%} of the {name}" for name, ratio in self.ratios.items())
