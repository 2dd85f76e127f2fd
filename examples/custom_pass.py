"""Your own criterion and your own graph pass, each in under ten lines, in one pipeline.

python examples/custom_pass.py
"""

import torch
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.passes import ChannelPruner, Layer, Speedup


class DeviationPruner(ChannelPruner):
    """Masks the filters whose weights vary least: those that all but average what they see."""

    def score(self, layer: Layer) -> Tensor:
        return layer.weight.flatten(1).std(dim=1)


@fxcompress.graph_pass(preserves=True)
def drop_repeated_relus(module: fx.GraphModule) -> None:
    """relu(relu(x)) is relu(x)."""
    calls = [node for node in module.graph.nodes if node.op == "call_module"]
    relus = [node for node in calls if isinstance(module.get_submodule(str(node.target)), nn.ReLU)]
    for node in relus:
        if node.args[0] in relus:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


class Block(nn.Module):
    """A residual block that ends in a ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(x + self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x))))))


class Network(nn.Sequential):
    """Its author put a ReLU behind every part, blocks included."""

    def __init__(self) -> None:
        stem = nn.Conv2d(3, 32, 3, padding=1), nn.ReLU()
        blocks = Block(32), nn.ReLU(), Block(32), nn.ReLU()
        super().__init__(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def main() -> fxcompress.TracedModule:
    torch.manual_seed(0)
    model, x = Network().eval(), torch.randn(2, 3, 16, 16)
    passes = [drop_repeated_relus, DeviationPruner(0.5), Speedup()]
    small = fxcompress.compress(model, passes, example_inputs=x)

    print(fxcompress.report(model, small, x))
    for step in small.meta["history"]:
        checked = "" if step.difference is None else f", verified to {step.difference:.1e}"
        print(f"{step.name}: {'changed the model' if step.modified else 'changed nothing'}{checked}")
        for note in step.notes:
            print(f"    {note}")
    return small


if __name__ == "__main__":
    main()
