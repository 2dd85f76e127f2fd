"""What the quantizers share that prepare a model for integer kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fxcompress.module import TracedModule
from fxcompress.passes.quantizer import Quantizer
from fxcompress.quantization.bits import Bits, require_bits
from fxcompress.quantization.sites import Site, find_tables
from fxcompress.quantization.spec import QuantSpec


@dataclass(frozen=True)
class KernelQuantizer(Quantizer):
    """Rounds activations wherever integer kernels read or write them.

    Args:
        activation_bits: of every value that integer kernels read or write.
        product_bits: of what products of two activations read (``matmul``, ``bmm``, scaled-dot-product attention: its
            queries, keys and values); float by default.
        embeddings: the weights of embeddings are rounded too, symmetrically to ``weight_bits`` bits with a scale for
            each row; a linear layer that reads the same weight reads the rounded one. ``first_last`` does not count
            them. Tables with ``max_norm`` or sparse gradients stay float.

    See :class:`Quantizer` for the other options.
    """

    activation_bits: Bits | None = 8
    product_bits: int | None = None
    embeddings: bool = field(default=False, kw_only=True)  # options by position stay what they were

    needs_inputs: ClassVar[bool] = True
    kernels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.product_bits is not None:
            require_bits("product_bits", self.product_bits)

    def product_spec(self) -> QuantSpec | None:
        """Like other activations."""
        return None if self.product_bits is None else self.activation_spec(self.product_bits)

    def tables(self, module: TracedModule) -> list[Site]:
        """All, if asked for."""
        return list(find_tables(module)) if self.embeddings else []
