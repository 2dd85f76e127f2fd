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
    missing = _missing(_FLOAT)
    if missing:
        raise PassError(
            f"backend='torch' needs the operators {', '.join(missing)}, which torch {torch.__version__} lacks; "
            "expected a CPU build of torch 2.13 or newer with onednn (torch.backends.mkldnn.is_available()). Install "
            "one, or keep the module as it is."
        )


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


def int8_missing() -> str | None:
    """What int8 kernels need and this machine or this torch has not; None = nothing.

    Without 8-bit multiply-accumulate instructions onednn adds products of integers in 16 bits, which overflows: results
    would be wrong, not slow.
    """
    missing = _missing(_INT8)
    if missing:
        return f"int8 kernels need the operators {', '.join(missing)}, which torch {torch.__version__} lacks"
    if not has_int8_instructions():
        return (
            "int8 kernels need 8-bit multiply-accumulate instructions (AVX512 VNNI, AVX VNNI or AMX); this processor "
            f"({processor()}) has none"
        )
    return None


def require_int8() -> None:
    """What int8 kernels need, where a lowered module is already there: it may come from another machine.

    Raises:
        PassError: with what is missing.
    """
    missing = int8_missing()
    if missing is not None:
        raise PassError(f"{missing}. Run this module elsewhere, or use the fake-quantized module that it was made of.")


def has_bfloat16() -> bool:
    """Whether the processor has bfloat16 instructions, or the means to emulate them."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_int8_instructions() -> bool:
    """Whether the processor adds products of 8-bit integers in 32 bits."""
    return bool(torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported())


def processor() -> str:
    """The processor for messages."""
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _missing(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if not _exists(name)]


def _exists(name: str) -> bool:
    space, _, operator = name.partition("::")
    return hasattr(getattr(torch.ops, space), operator)
