"""Recurrent layers: which operator each of them calls, their functional form, and their attributes.

An opened ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` or cell is a call of :func:`recurrent_layer` or :func:`recurrent_cell`
that is given its weights, so that masks can sit on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.module import submodule
from fxcompress.rewrite import Rewriter

_LAYERS = (nn.LSTM, nn.GRU, nn.RNN)
_CELLS: dict[type[nn.Module], str] = {nn.LSTMCell: "lstm_cell", nn.GRUCell: "gru_cell"}
#: How many blocks of rows, one for each gate, the weights of a layer have for its hidden units.
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def operator_of(layer: nn.Module) -> str | None:
    """The operator that a recurrent layer or cell calls: a key of :data:`GATES`, for a cell with ``_cell`` behind it.

    None for any other module.
    """
    if isinstance(layer, _LAYERS):
        return str(layer.mode).lower()
    if type(layer) is nn.RNNCell:
        return f"rnn_{layer.nonlinearity}_cell"
    return _CELLS.get(type(layer))


def gates_of(operator: str) -> int:
    """How many gates an operator of :func:`operator_of` computes for each hidden unit."""
    return GATES[operator.removesuffix("_cell")]


def weight_names(layer: nn.Module) -> list[str]:
    """Names of a recurrent layer's parameters, in the order in which its operator takes them."""
    if isinstance(layer, nn.RNNBase):
        return list(layer._flat_weights_names)
    return [name for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if layer._parameters[name] is not None]


def recurrent_layer(
    x: Tensor,
    state: Any,
    weights: list[Tensor],
    operator: str,
    has_biases: bool,
    layers: int,
    dropout: float,
    bidirectional: bool,
    batch_first: bool,
    training: bool,
) -> Any:
    """What ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` compute, with given weights.

    Args:
        x: ``[T, N, I]``, with ``batch_first`` ``[N, T, I]``; ``[T, I]`` without a batch.
        state: ``[layers * directions, N, H]``, without N if ``x`` has none; a pair of them for an LSTM (with
            projections the first has their size); None for zeros.
        weights: of every layer and direction in turn, as in ``nn.RNNBase``.
        operator: a key of :data:`GATES`.

    Returns:
        ``(output, state)``, shaped as ``x`` and ``state`` are.
    """
    batched = x.dim() == 3
    x = x if batched else x.unsqueeze(0 if batch_first else 1)
    if state is None:
        rows, batch = layers * (2 if bidirectional else 1), x.shape[0 if batch_first else 1]
        state = _zeros(x, weights, operator, (rows, batch))
    elif not batched:
        state = tuple(item.unsqueeze(1) for item in state) if operator == "lstm" else state.unsqueeze(1)
    function = getattr(torch, operator)
    output, *last = function(x, state, weights, has_biases, layers, dropout, training, bidirectional, batch_first)
    if not batched:
        output, last = output.squeeze(0 if batch_first else 1), [item.squeeze(1) for item in last]
    return output, tuple(last) if operator == "lstm" else last[0]


def recurrent_cell(x: Tensor, state: Any, weights: list[Tensor], operator: str) -> Any:
    """What ``nn.LSTMCell``, ``nn.GRUCell`` and ``nn.RNNCell`` compute, with given weights.

    Args:
        x: ``[N, I]``, or ``[I]``.
        state: ``[N, H]``, or ``[H]``; a pair of them for an LSTM; None for zeros.
        weights: those of the input and of the state, and their biases if there are any.
        operator: a key of :data:`GATES`, ``_cell`` behind it.

    Returns:
        The next state, shaped as ``state`` is.
    """
    batched = x.dim() == 2
    x = x if batched else x.unsqueeze(0)
    lstm = operator == "lstm_cell"
    if state is None:
        state = _zeros(x, weights, operator.removesuffix("_cell"), (x.shape[0],))
    elif not batched:
        state = tuple(item.unsqueeze(0) for item in state) if lstm else state.unsqueeze(0)
    made = getattr(torch, operator)(x, state, *weights)
    if not batched:
        made = tuple(item.squeeze(0) for item in made) if lstm else made.squeeze(0)
    return made


def _zeros(x: Tensor, weights: Sequence[Tensor], operator: str, shape: tuple[int, ...]) -> Any:
    """The initial state of a layer that is given none."""
    hidden = x.new_zeros(*shape, weights[1].shape[1])
    return (hidden, x.new_zeros(*shape, weights[0].shape[0] // GATES["lstm"])) if operator == "lstm" else hidden


def open_recurrent(rewriter: Rewriter, node: fx.Node, weights: Sequence[fx.Node]) -> None:
    """Write the ``call_module`` node of a recurrent layer as a functional call.

    Args:
        rewriter: of the module.
        node: the call.
        weights: nodes of the layer's parameters, in the order of :func:`weight_names`.
    """
    target = str(node.target)
    layer, operator = submodule(rewriter.module, target), operator_of(submodule(rewriter.module, target))
    assert operator is not None
    x, state = (node.args[i] if i < len(node.args) else node.kwargs.get(n) for i, n in enumerate(("input", "hx")))
    if not isinstance(layer, nn.RNNBase):
        rewriter.become(node, "call_function", recurrent_cell, (x, state, list(weights), operator))
        return
    holder = rewriter.insert_before(node, "get_attr", target, ())
    training = rewriter.insert_before(node, "call_function", getattr, (holder, "training"))  # stays a switch
    holder.meta["mask"] = training.meta["mask"] = True
    options = (layer.bias, layer.num_layers, layer.dropout, layer.bidirectional, layer.batch_first, training)
    rewriter.become(node, "call_function", recurrent_layer, (x, state, list(weights), operator, *options))


def closed_arguments(node: fx.Node) -> tuple[Any, ...]:
    """The arguments of the layer that :func:`open_recurrent` wrote as ``node``."""
    x, state, *_ = node.args
    return (x,) if state is None else (x, state)


def agree_recurrent(layer: nn.Module) -> None:
    """Let a recurrent layer's attributes say what its weights' shapes are."""
    operator = operator_of(layer)
    assert operator is not None
    first, second, *_ = (layer._parameters[name] for name in weight_names(layer))
    assert first is not None
    assert second is not None
    attributes: Any = layer
    attributes.input_size, attributes.hidden_size = first.shape[1], first.shape[0] // gates_of(operator)
    if isinstance(layer, nn.RNNBase):
        layer.proj_size = second.shape[1] if layer.proj_size else 0
        attributes._init_flat_weights()
