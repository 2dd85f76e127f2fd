"""The forms of attention that generated networks take: channels and heads counted by hand, and removal."""

from typing import Any

import pytest
from removal import check_removal

import fxcompress
from fxcompress.passes import RandomFilterPruner
from fxcompress.testing import Op, Spec, inputs, network

GRANULARITIES = ("channel", "head_dim", "head")

#: Between a convolution to 7 channels and a head: form, removable channels by hand, and heads that may go.
MOTIFS = {
    "shared, repeated": (Op("attention_shared", 3), 7 + 3 * 5 * 2, [3]),  # 3 sets of 2 heads of 5
    "shared, expanded": (Op("attention_shared", 4, 1), 7 + 2 * 2 * 2, [2]),  # 2 sets of 3 heads of 2
    "shared, enabled": (Op("attention_shared", 5, 2), 7 + 3 * 3 * 2, [3]),
    "one for all": (Op("attention_shared", 6, 3), 7 + 4 * 2, [3]),
    "crossed": (Op("attention_cross", 5), 7 + 2 * 4 * 2, [2]),  # 2 heads of 4, of queries and of values
    "learned queries": (Op("attention_cross", 6, 1), 7 + 3 * 2 * 2 + 3, [3]),
    "window, shifted": (Op("attention_window", 5), 7 + 3 * 4 * 2, [3]),
    "window, bias tensor": (Op("attention_window", 4, 2), 7 + 2 * 3 * 2, [2]),
    "talking": (Op("attention_talking", 3), 7 + 2 * 3 * 2 + 2 + 2, [2]),
    "talking by convolution": (Op("attention_talking", 4, 1), 7 + 3 * 2 * 2 + 3, [3]),
    "cosine": (Op("attention_talking", 4, 2), 7 + 3 * 2 * 2, [3]),
    "block, norms in front": (Op("transformer_block", 5), 7 + 2 * 4 * 2 + 5, [2]),
    "block, norms behind": (Op("transformer_block", 5, 1), 7 + 2 * 4 * 2 + 5, [2]),
    "block, two tokens": (Op("transformer_block", 7, 2), 7 + 2 * 3 * 2 + 7, [2]),
}


def spec_of(op: Op) -> Spec:
    return Spec((Op("conv_bn_relu", 7), op, Op("head", 8)), 3, 3, (5, 6))


@pytest.mark.parametrize("name", MOTIFS)
def test_channels_of_a_motif(name: str) -> None:
    op, removable, heads = MOTIFS[name]
    groups = fxcompress.channel_groups(network(spec_of(op)).eval(), inputs(spec_of(op)))
    assert groups.removable == removable
    assert [item.width for item in groups.row_sets] == heads


FORMS = [
    *(Op("attention_shared", 4, variant) for variant in range(4)),
    *(Op("attention_cross", 6, variant) for variant in range(2)),
    *(Op("attention_window", 5, variant) for variant in range(4)),
    *(Op("attention_linear", 5, variant) for variant in range(3)),
    *(Op("attention_talking", 4, variant) for variant in range(3)),
    *(Op("transformer_block", 5, variant) for variant in range(4)),
    *(Op("tied_embedding", 6, variant) for variant in range(2)),
]


@pytest.mark.filterwarnings("ignore:.* has nothing to prune")
@pytest.mark.parametrize("op", FORMS, ids=lambda op: f"{op.kind}-{op.variant}")
def test_a_motif_pruned(op: Op) -> None:
    granularity: Any = GRANULARITIES[op.variant % 3] if op.kind == "attention_linear" else "head"
    check_removal(spec_of(op), RandomFilterPruner(0.5, granularity=granularity, seed=op.width))
