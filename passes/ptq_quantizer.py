"""Quantization after training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torch import Tensor

from fxcompress.context import Context
from fxcompress.errors import InputError
from fxcompress.module import TracedModule
from fxcompress.passes.fold_batch_norm import FoldBatchNorm
from fxcompress.passes.kernel_quantizer import KernelQuantizer
from fxcompress.passes.quantizer import feed
from fxcompress.quantization.calibrate import Calibrator
from fxcompress.quantization.equalize import equalize
from fxcompress.quantization.fake_quantize import AffineFakeQuantize, FakeQuantize
from fxcompress.quantization.insert import Slot
from fxcompress.quantization.observers import MSE, Entropy, MinMax, MovingAverage, Observer, Percentile
from fxcompress.quantization.reconstruct import correct_biases, learn_rounding
from fxcompress.quantization.spec import QuantSpec, activation_spec, weight_spec
from fxcompress.task import require_count

OBSERVERS: dict[str, type[Observer]] = {
    "min_max": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "entropy": Entropy,
    "mse": MSE,
}


@dataclass(frozen=True)
class PTQQuantizer(KernelQuantizer):
    """Quantizes a trained model with a few batches to calibrate, without training.

    BatchNorm is folded; then ranges are what ``observer`` makes of what calibration sees: batches of the task, or the
    example inputs alone if there is no task.

    Args:
        per_channel: a scale for every output channel of a weight, or one for the tensor.
        observer: of activations: ``"min_max"``, ``"moving_average"``, ``"percentile"``, ``"entropy"``, ``"mse"``, or
            an :class:`Observer`: one of these with options, such as ``Percentile(99.9)``, or a subclass of yours.
        weight_observer: likewise of weights.
        batches: how many of the task's to calibrate with, at most.
        equalize: make the ranges of neighbouring layers alike first (:func:`equalize`).
        bias_correction: take the mean error of rounded weights out of the biases (:func:`correct_biases`).
        adaround: learn for each weight whether to round up or down (:func:`learn_rounding`); the parameters hold the
            rounded values then.
        iterations: of AdaRound, per layer.
        samples: kept of what each layer reads, for the last two.
        symmetric: activations have zero point 0, with signed integers where calibration sees negative values:
            a coarser grid for what is mostly positive (SiLU), and faster in OpenVINO.

    See :class:`KernelQuantizer` and :class:`Quantizer` for the other options.
    """

    per_channel: bool = True
    observer: str | Observer = "min_max"
    weight_observer: str | Observer = "min_max"
    batches: int = 16
    equalize: bool = False
    bias_correction: bool = False
    adaround: bool = False
    iterations: int = 1000
    samples: int = 256
    symmetric: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("observer", "weight_observer"):
            _parse(name, getattr(self, name))
        for name in ("batches", "iterations", "samples"):
            require_count(name, getattr(self, name))

    def weight_spec(self, bits: int) -> QuantSpec:
        """Symmetric, per output channel by default."""
        observer = _parse("weight_observer", self.weight_observer)
        return weight_spec(bits, axis=0 if self.per_channel else None, observer=observer)

    def activation_spec(self, bits: int) -> QuantSpec:
        """Per tensor, affine by default."""
        return activation_spec(bits, _parse("observer", self.observer), symmetric=self.symmetric)

    def calibration(self, context: Context) -> Iterator[Any]:
        """As many batches as asked for."""
        return self.first_batches(context, self.batches)

    def prepare(self, module: TracedModule, context: Context) -> TracedModule:
        """Fold BatchNorm, equalize."""
        module = FoldBatchNorm().run(module, context)
        if self.equalize:
            context.notes.append(f"{equalize(module, self.name)} pairs of layers equalized")
        return module

    def make(self, slot: Slot, seen: Calibrator) -> FakeQuantize:
        """A grid over the range, which no longer changes."""
        made = AffineFakeQuantize(seen.fitting().frozen(), slot.channels, calls=slot.calls)
        made.set_range(*seen.range())
        return made

    def finish(self, module: TracedModule, context: Context, seen: dict[str, Calibrator]) -> None:
        """Learn which way to round, correct biases."""
        run = partial(feed, module, context)
        before: dict[str, Tensor] = {}
        if self.adaround:
            before = learn_rounding(
                module,
                partial(self.calibration, context),
                run,
                samples=self.samples,
                iterations=self.iterations,
                author=self.name,
            )
        if self.bias_correction:
            new = correct_biases(module, self.calibration(context), run, self.samples, self.name, before)
            if new:
                context.notes.append(f"adds {', '.join(new)}")


def _parse(role: str, observer: str | Observer) -> Observer:
    """An observer by its name, with its defaults, or as it was given."""
    if isinstance(observer, Observer):
        hidden = sorted(vars(observer).keys() - {item.name for item in fields(observer)})
        if hidden:
            raise InputError(
                f"{role} is a {type(observer).__name__} with {', '.join(hidden)} beside its fields; expected a frozen "
                "dataclass, whose fields are all that makes it differ from others of its kind."
            )
        return observer
    if not isinstance(observer, str) or observer not in OBSERVERS:
        raise InputError(
            f"{role} is {observer!r}; expected one of {', '.join(map(repr, OBSERVERS))}, or an Observer, such as "
            "Percentile(99.9) or an instance of a subclass of yours."
        )
    return OBSERVERS[observer]()
