"""Which rule an ATen operator follows, and how a call is read."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from fxcompress.channels import contractions, recurrence, reductions, rules
from fxcompress.channels.rules import Rule

_ROWS: dict[Rule, str] = {
    rules.same: "clone alias detach contiguous lift_fresh lift_fresh_copy",
    rules.view: "view _unsafe_view reshape _reshape_alias",
    rules.expand: "expand",
    rules.permutation: "permute transpose t numpy_T movedim unsqueeze",
    rules.movement: """select slice split split_with_sizes unbind squeeze unfold diagonal roll flip repeat
        pixel_unshuffle
        channel_shuffle native_channel_shuffle narrow reflection_pad1d reflection_pad2d reflection_pad3d
        replication_pad1d replication_pad2d replication_pad3d rot90 unsafe_split unsafe_split_with_sizes unsafe_chunk
        chunk""",
    rules.pixel_shuffle: "pixel_shuffle",
    rules.cat: "cat",
    rules.stack: "stack",
    rules.pad: "constant_pad_nd",
    rules.index: "index index_select",
    rules.im2col: "im2col",
    rules.pointwise: """copy _to_copy prelu _prelu_kernel dropout fill masked_fill hardswish where zero native_dropout
        hardtanh hardsigmoid celu selu feature_dropout bernoulli log_sigmoid_forward lerp addcmul addcdiv clamp
        nan_to_num rrelu_with_noise""",
    contractions.matmul: "mm bmm addmm baddbmm mv dot",
    contractions.convolution: "convolution _convolution convolution_overrideable",
    recurrence.recurrent: """lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell""",
    reductions.reduction: """sum mean amax amin prod std var std_mean var_mean logsumexp linalg_vector_norm norm any all
        nansum count_nonzero""",
    reductions.extremum: "max min",
    reductions.softmax: "_softmax _log_softmax _safe_softmax",
    reductions.layer_norm: "native_layer_norm _fused_rms_norm",
    reductions.weight_norm: "_weight_norm_interface",
    reductions.group_norm: "native_group_norm",
    reductions.batch_norm: """native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
        _batch_norm_with_update cudnn_batch_norm""",
    reductions.spatial: """max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d
        avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
        adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d
        upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_nearest_exact1d
        _upsample_nearest_exact2d _upsample_nearest_exact3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
        adaptive_avg_pool1d adaptive_avg_pool2d grid_sampler_2d grid_sampler_3d""",
    reductions.along: "sort topk argsort cumsum cumprod argmax argmin tril triu kthvalue median mode logcumsumexp",
    reductions.glu: "glu",
    reductions.embedding: "embedding",
    reductions.like: "zeros_like ones_like full_like empty_like",
    reductions.factory: "zeros ones full empty new_zeros new_ones new_full new_empty",
}
RULES: dict[str, Rule] = {name: rule for rule, names in _ROWS.items() for name in names.split()}
#: ``max`` and ``min`` of two tensors are pointwise.
_BINARY = frozenset(("max", "min"))


@cache  # a schema is read through the binding, slowly
def operator_name(func: Any) -> tuple[str, bool]:
    """The operator's name without namespace, overload and in-place underscore; whether it was in place."""
    name = func._schema.name.partition("::")[2]
    inplace = name.endswith("_") and not name.endswith("__")
    return (name[:-1] if inplace else name), inplace


def rule_for(func: Any, name: str, arguments: dict[str, Any]) -> Rule | None:
    """The rule of an operator, or None for an operator that nobody described."""
    if name in _BINARY and "other" in arguments:
        return rules.pointwise
    if name in _BINARY and "dim" not in arguments:
        return reductions.reduction
    rule = RULES.get(name)
    if rule is None and is_pointwise(func, name):
        return rules.pointwise
    return rule


def read_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names in the operator's schema; those left at their defaults are absent."""
    named = dict(zip(_argument_names(func), args, strict=False))
    return {**named, **kwargs} if kwargs else named


@cache
def is_pointwise(func: Any, name: str) -> bool:
    """Whether an operator works element by element: somebody said so here, or ATen does."""
    rule = RULES.get(name)
    return rule is rules.pointwise or (rule is None and torch.Tag.pointwise in func.tags)


@cache
def _argument_names(func: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in func._schema.arguments)
