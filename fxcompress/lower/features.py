"""What this machine and this torch can run."""

from __future__ import annotations

import platform

import torch

from fxcompress.errors import PassError

_FLOAT = (
    "mkldnn::_convolution_pointwise",
    "mkldnn::_linear_pointwise",
    "mkldnn::_reorder_convolution_weight",
    "mkldnn::_reorder_linear_weight",
)
_INT8 = (
    "onednn::qconv_prepack",
    "onednn::qconv_pointwise",
    "onednn::qconv2d_pointwise",
    "onednn::qconv1d_pointwise",
    "onednn::qlinear_prepack",
    "onednn::qlinear_pointwise",
    "onednn::qbatch_norm2d",
)


def require_float() -> None:
    """The kernels that float layers are lowered to.

    Raises:
        PassError: this torch was built without some of them.
    """
    _require_operators(_FLOAT, "backend='torch'")


def require_bfloat16() -> None:
    """The kernels, and a processor with bfloat16 instructions or the means to emulate them.

    Raises:
        PassError: with what is missing.
    """
    require_float()
    if not has_bfloat16():
        raise PassError(
            f"dtype='bfloat16' needs a processor with AVX512 or better; this one ({processor()}) has none of it. Lower "
            "with dtype='float32'."
        )


def require_int8() -> None:
    """The kernels, and 8-bit multiply-accumulate instructions.

    Without them onednn adds products of 8-bit integers in 16 bits, which overflows: results would be wrong, not slow.

    Raises:
        PassError: with what is missing.
    """
    _require_operators(_INT8, "int8 lowering with backend='torch'")
    if not has_int8_instructions():
        raise PassError(
            f"int8 lowering with backend='torch' needs 8-bit multiply-accumulate instructions (AVX512 VNNI, AVX VNNI "
            f"or AMX); this processor ({processor()}) has none. Without them sums of products overflow in 16 bits. "
            "Keep the fake-quantized module, or lower the float model with Lower(dtype='float32')."
        )


def has_bfloat16() -> bool:
    """Whether the processor has bfloat16 instructions, or the means to emulate them."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_int8_instructions() -> bool:
    """Whether the processor adds products of 8-bit integers in 32 bits."""
    return bool(torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported())


def processor() -> str:
    """The processor for messages."""
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _require_operators(names: tuple[str, ...], what: str) -> None:
    missing = [name for name in names if not _exists(name)]
    if missing:
        raise PassError(
            f"{what} needs the operators {', '.join(missing)}, which torch {torch.__version__} lacks; expected a CPU "
            "build of torch 2.13 or newer with onednn (torch.backends.mkldnn.is_available()). Install one, or keep the "
            "module as it is."
        )


def _exists(name: str) -> bool:
    space, _, operator = name.partition("::")
    return hasattr(getattr(torch.ops, space), operator)
