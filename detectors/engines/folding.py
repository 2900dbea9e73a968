"""Batch norms that have learned, folded into the convolutions before them: fewer layers that compute the same."""

from copy import deepcopy
from typing import TypeVar

from torch import nn
from torch.fx import Graph, Tracer
from torch.nn.utils.fusion import fuse_conv_bn_eval

M = TypeVar("M", bound=nn.Module)

_CONVOLUTIONS = nn.Conv2d | nn.ConvTranspose2d


def folded(module: M) -> M:
    """A module in eval mode → a copy, equal to about 1e-6 in float32.

    Fold before rounding: the products of rounded factors are not the rounded products. Norms that follow no
    convolution, and those of the instance, stay as they are.
    """
    copy = deepcopy(module).eval()
    for child in copy.children():  # what is around the networks cannot be traced, and has no norms
        for first, second in _pairs(child):
            conv, norm = child.get_submodule(first), child.get_submodule(second)
            if isinstance(conv, _CONVOLUTIONS) and isinstance(norm, nn.BatchNorm2d):
                transposed = isinstance(conv, nn.ConvTranspose2d)
                child.set_submodule(first, fuse_conv_bn_eval(conv, norm, transpose=transposed))
                child.set_submodule(second, getattr(norm, "act", nn.Identity()))  # timm's have their activation inside
    return copy


class _Layers(Tracer):
    """Looks into blocks, but not into layers, those of timm included."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is a layer."""
        return isinstance(m, _CONVOLUTIONS | nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def _pairs(network: nn.Module) -> list[tuple[str, str]]:
    """The names of layers that follow one another, where only the second sees what the first says."""
    graph: Graph = _Layers().trace(network)
    return [
        (str(before.target), str(node.target))
        for node in graph.nodes
        for before in node.all_input_nodes
        if node.op == before.op == "call_module" and len(before.users) == 1
    ]
