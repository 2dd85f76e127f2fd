"""Polynomials of a model's cost as arrays: thousands of allocations at once, and what one more unit of each costs.

Nearly all terms have at most two widths in them (inputs times outputs), so that a figure is a quadratic form, and its
value at many allocations a product of matrices. Terms of more widths, which an einsum may have, are kept apart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import sympy

from fxcompress.channels.labels import FloatArray, IntArray
from fxcompress.symbolic import Sum

#: Coefficients by the widths that they multiply, as indices in rising order.
Terms = dict[tuple[int, ...], Fraction]


class Figure(Protocol):
    """What allocations cost: never less where one of them keeps more."""

    def value(self, kept: FloatArray) -> FloatArray:
        """What allocations cost: (allocations, groups) -> (allocations,)."""
        ...

    def growth(self, kept: FloatArray, by: FloatArray) -> FloatArray:
        """What allocations cost more if one group grows: (allocations, groups), twice -> (allocations, groups)."""
        ...


@dataclass(frozen=True)
class Polynomial:
    """``constant + linear @ k + k @ quadratic @ k + sum_t coefficients[t] * prod_j w[powers[t, j]]`` for units ``k`` of
    every group, which are widths ``w = units @ k + fixed``.

    Attributes:
        linear: (groups,).
        quadratic: (groups, groups), symmetric.
        coefficients: (terms,), of the terms of more than two widths.
        powers: (terms, degree): their widths; the number of widths stands for 1.
        units: (widths, groups): how wide a width gets with each unit.
        fixed: (widths,): how wide it is without any.
    """

    constant: float
    linear: FloatArray
    quadratic: FloatArray
    coefficients: FloatArray
    powers: IntArray
    units: FloatArray
    fixed: FloatArray

    @classmethod
    def of(cls, terms: Terms, units: FloatArray, fixed: FloatArray) -> Polynomial:
        """A polynomial in widths as one in units.

        Args:
            terms: their coefficients.
            units: (widths, groups): how wide a width gets with each unit that is kept of a group.
            fixed: (widths,): how wide it is without any.
        """
        size = len(fixed)
        linear, quadratic = np.zeros(size), np.zeros((size, size))
        high = {key: coefficient for key, coefficient in terms.items() if len(key) > 2}
        for key, coefficient in terms.items():
            if len(key) == 1:
                linear[key[0]] += float(coefficient)
            elif len(key) == 2:
                quadratic[key[0], key[1]] += float(coefficient) / 2
                quadratic[key[1], key[0]] += float(coefficient) / 2
        constant = float(terms.get((), Fraction(0))) + linear @ fixed + fixed @ quadratic @ fixed
        degree = max(map(len, high), default=0)
        powers = np.array([[*key, *[size] * (degree - len(key))] for key in high], dtype=np.int64)
        return cls(
            float(constant),
            (linear + 2 * fixed @ quadratic) @ units,
            units.T @ quadratic @ units,
            np.array([float(coefficient) for coefficient in high.values()]),
            powers.reshape(len(high), degree),
            units,
            fixed,
        )

    def scaled(self, factor: float) -> Polynomial:
        """The polynomial times a number."""
        return replace(
            self,
            constant=self.constant * factor,
            linear=self.linear * factor,
            quadratic=self.quadratic * factor,
            coefficients=self.coefficients * factor,
        )

    def value(self, kept: FloatArray) -> FloatArray:
        """See :class:`Figure`."""
        total: FloatArray = ((kept @ self.quadratic + self.linear) * kept).sum(axis=-1) + self.constant
        return total + self._high(kept) if len(self.coefficients) else total

    def growth(self, kept: FloatArray, by: FloatArray) -> FloatArray:
        """See :class:`Figure`."""
        more: FloatArray = (2 * kept @ self.quadratic + self.linear + by * np.diag(self.quadratic)) * by
        if len(self.coefficients):
            before = self._high(kept)
            for group in range(kept.shape[1]):
                grown = kept.copy()
                grown[:, group] += by[:, group]
                more[:, group] += self._high(grown) - before
        return more

    def _high(self, kept: FloatArray) -> FloatArray:
        """What the terms of more than two widths add: (allocations,)."""
        widths = np.ones((len(kept), len(self.fixed) + 1))
        widths[:, :-1] = kept @ self.units.T + self.fixed
        total: FloatArray = widths[:, self.powers].prod(axis=-1) @ self.coefficients
        return total


class Exact:
    """A figure in integers: ``sum_parts ceil(polynomial / divisor)``, at widths that a removal can leave.

    Doubles count exactly up to 2^53: 9e15 MACs for each sample.

    Args:
        sums: of the figure.
        symbols: for every width its index.
    """

    def __init__(self, sums: Sequence[Sum], symbols: Mapping[Any, int]) -> None:
        whole = [item for item in sums if item.samples == 1]
        rounded = [item for item in sums if item.samples > 1 and item.products]  # each of them by itself
        size = len(symbols)
        self.terms: Terms = {}
        self._parts: list[tuple[Polynomial, int]] = []
        for items in (whole, *([item] for item in rounded)):
            terms = _total(items, symbols)
            divisor = math.lcm(*(coefficient.denominator for coefficient in terms.values()))
            numerator = {key: coefficient * divisor for key, coefficient in terms.items()}
            self._parts.append((Polynomial.of(numerator, np.eye(size), np.zeros(size)), divisor))
            _add(self.terms, terms)
        _add(self.terms, {(): Fraction(len(rounded))})

    def value(self, widths: IntArray) -> FloatArray:
        """(allocations, widths) -> (allocations,)."""
        given = widths.astype(np.float64)
        total: FloatArray = np.sum([np.ceil(part.value(given) / divisor) for part, divisor in self._parts], axis=0)
        return total


def _total(sums: Iterable[Sum], symbols: Mapping[Any, int]) -> Terms:
    """Everything that sums have, before it is rounded up."""
    total: Terms = {}
    for item in sums:
        for product in item.products:
            terms: Terms = {(): Fraction(product.coefficient, product.denominator * item.samples)}
            for factor in product.factors:
                terms = _times(terms, _terms(factor, symbols))
            _add(total, terms)
    return total


def _add(total: Terms, more: Terms) -> None:
    for key, coefficient in more.items():
        total[key] = total.get(key, Fraction(0)) + coefficient


def _times(left: Terms, right: Terms) -> Terms:
    made: Terms = {}
    for (one, first), (two, second) in itertools.product(left.items(), right.items()):
        key = tuple(sorted((*one, *two)))
        made[key] = made.get(key, Fraction(0)) + first * second
    return made


def _terms(factor: Any, symbols: Mapping[Any, int]) -> Terms:
    """The terms of a polynomial in widths."""
    made: Terms = {}
    for term in sympy.Add.make_args(sympy.expand(factor)):
        coefficient: Any
        coefficient, rest = term.as_coeff_Mul()
        powers = {} if rest == 1 else rest.as_powers_dict()
        key = tuple(sorted(symbols[symbol] for symbol, power in powers.items() for _ in range(int(power))))
        made[key] = made.get(key, Fraction(0)) + Fraction(int(coefficient.p), int(coefficient.q))
    return made
