"""Finds the convolutions whose zero padding must follow α, and gives them ring padding.

Works on the traced graph, not on model classes: wherever a padded convolution reads a blended activation, the
map before that activation is followed back through the region's linear layers to the region's entry.
"""

__all__ = ["TRAINING_REACH", "install", "remove"]

import operator
from typing import cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from pipeline.alpha.activation import AlphaActivation
from pipeline.alpha.field import (
    ActivationField,
    AffineField,
    ConvField,
    EntryField,
    Field,
    SumField,
    Tap,
    zero_pads,
)
from pipeline.alpha.padding import RingConv2d
from pipeline.folding.trace import trace

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# A region of n blended activations needs a margin n layers deep, and its cost grows as fast. Training bounds it: beyond
# this reach the border stays zero.
TRAINING_REACH = 3


class _Unsupported(Exception):
    """Why one convolution keeps its zero padding."""


class _Graph:
    """A network's graph, and the network's own modules that its nodes call.

    Tracing takes norms that carry their activation apart (`n` becomes `n.bn` and `n.act`); the network keeps them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.nodes: list[fx.Node] = list(trace(model).graph.nodes)
        self._modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))

    def module(self, node: fx.Node) -> nn.Module | None:
        """The network's module that `node` calls, or None."""
        if node.op != "call_module":
            return None
        name = str(node.target)
        return self._modules[name] if name in self._modules else self._modules[name.removesuffix(".bn")]


def remove(model: nn.Module) -> None:
    """Puts the original convolutions back in place of the rings that still follow an α, and drops their taps.

    Rings of an earlier `settle` stay: their activations are gone for good.
    """
    kept: set[int] = set()
    for name, module in list(model.named_modules()):
        if isinstance(module, RingConv2d):
            if module.ring_exact:
                kept.update(id(tap) for tap in module.field.taps())
            else:
                _replace(model, name, module.conv)
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, Tap) and id(hook) not in kept:
                del module._forward_pre_hooks[key]


def install(
    model: nn.Module, linear: dict[str, AlphaActivation | None], *, reach: int | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """Gives ring padding to the padded convolutions that read a blended activation; changes `model`.

    Args:
        model: The network, its blended activations in place.
        linear: Blended activations by dotted name; None for one that has settled at the identity.
        reach: How many blended activations a ring looks back through; None for all.

    Returns:
        Convolutions with a ring, by name, with the activation that they read; and padded convolutions that
        keep their zeros although they read a blended activation, with the reason.

    Raises:
        TraceError: The network cannot be traced.
    """
    return _Installer(model, linear, reach).run()


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _plain(module: nn.Module | None) -> nn.Conv2d | None:
    """The convolution behind a module, if it is one."""
    if isinstance(module, RingConv2d):
        return module.conv
    return module if isinstance(module, nn.Conv2d) else None


class _Installer:
    """One pass over a traced network."""

    def __init__(self, model: nn.Module, linear: dict[str, AlphaActivation | None], reach: int | None) -> None:
        self.model = model
        self.graph = _Graph(model)
        self.linear = linear
        self.reach = len(linear) if reach is None else reach
        self.taps: dict[fx.Node, tuple[Tap, str]] = {}
        self.order = {node: index for index, node in enumerate(self.graph.nodes)}
        self.calls: dict[str, int] = {}
        for node in self.graph.nodes:
            if node.op == "call_module":
                self.calls[str(node.target)] = self.calls.get(str(node.target), 0) + 1

    def run(self) -> tuple[dict[str, str], dict[str, str]]:
        rings: dict[str, str] = {}
        left: dict[str, str] = {}
        # All fields are built before any module is replaced: they refer to the plain convolutions.
        found: list[tuple[str, nn.Conv2d, Field]] = []
        for node in self.graph.nodes:
            conv = _plain(self.graph.module(node))
            if conv is None or not _may_pad(conv):
                continue
            source = self._activation_before(node.args[0])
            if source is None:
                continue
            name = str(node.target)
            try:
                if self.calls[name] > 1:
                    raise _Unsupported("the convolution is called more than once")
                if conv.padding_mode != "zeros":
                    raise _Unsupported(f"its padding mode is {conv.padding_mode!r}, not zeros")
                if isinstance(self.graph.module(node), RingConv2d):
                    raise _Unsupported("it has ring padding already")
                if not _is_reader(conv):
                    raise _Unsupported(f"{type(conv).__name__} computes its own kernel or padding")
                found.append((name, conv, self._blended(cast(fx.Node, node.args[0]), self.reach, before=node)))
            except _Unsupported as reason:
                left[name] = str(reason)
                continue
            rings[name] = source
        for name, conv, field in found:
            settled = self.linear[rings[name]] is None
            _replace(self.model, name, RingConv2d(conv, field, ring_exact=settled))
        for tap, name in self.taps.values():  # last, so that a tapped convolution is the one that will run
            self.model.get_submodule(name).register_forward_pre_hook(tap)
        return rings, left

    def _blended_name(self, node: fx.Node) -> str | None:
        """The blended activation whose output `node` is."""
        name = str(node.target)
        return name if node.op == "call_module" and name in self.linear else None

    def _through(self, node: fx.Node) -> fx.Node | None:
        """The node before a layer that changes nothing, or None if `node` is not such a layer."""
        if self._blended_name(node) is not None:
            return None
        module = self.graph.module(node)
        silent = isinstance(module, (nn.Identity, *_DROPOUTS)) or type(module).__name__ == "DropPath"
        if node.op == "call_function":
            silent = node.target is F.dropout
        return cast(fx.Node, node.args[0]) if silent else None

    def _activation_before(self, node: object) -> str | None:
        """Name of the blended activation that feeds `node` directly, or None."""
        while isinstance(node, fx.Node):
            name = self._blended_name(node)
            if name is not None:
                return name
            node = self._through(node)
        return None

    def _blended(self, node: fx.Node, reach: int, before: fx.Node) -> Field:
        """The field of a blended activation's output."""
        while self._blended_name(node) is None:
            node = cast(fx.Node, self._through(node))
        return ActivationField(self.linear[str(node.target)], self._linear(node.args[0], reach - 1, before))

    @staticmethod
    def _affine(norm: nn.BatchNorm2d, source: Field) -> Field:
        if norm.running_mean is None:
            raise _Unsupported("the norm before it keeps no running statistics")
        return AffineField(norm, source)

    def _linear(self, value: object, reach: int, before: fx.Node) -> Field:
        """The field of a map before its activation: norms, adds and one convolution back to its input."""
        if not isinstance(value, fx.Node):
            raise _Unsupported("a constant is added before its activation")
        silent = self._through(value)
        if silent is not None:
            return self._linear(silent, reach, before)
        if self._blended_name(value) is not None or not self._is_linear(value):
            return self._entry(value, reach, before)
        module = self.graph.module(value)
        conv = _plain(module)
        if conv is not None:
            if not _is_reader(conv) or conv.padding_mode != "zeros":
                raise _Unsupported(f"{value.target} before it is not a plain zero-padded convolution")
            return ConvField(conv, self._entry(cast(fx.Node, value.args[0]), reach, before))
        if isinstance(module, nn.BatchNorm2d):
            return self._affine(module, self._linear(value.args[0], reach, before))
        if len(value.args) != 2 or value.kwargs:
            raise _Unsupported("an add with a factor comes before its activation")
        return SumField(self._linear(value.args[0], reach, before), self._linear(value.args[1], reach, before))

    def _is_linear(self, node: fx.Node) -> bool:
        module = self.graph.module(node)
        linear = isinstance(module, nn.BatchNorm2d) or _plain(module) is not None
        return linear or (node.op == "call_function" and node.target in _ADDITIONS)

    def _entry(self, node: fx.Node, reach: int, before: fx.Node) -> Field:
        """A region's input: another blended activation within reach, else the map itself among zeros."""
        if reach > 0 and self._activation_before(node) is not None:
            return self._blended(node, reach, before)
        for user in node.users:
            module = self.graph.module(user)
            seen = user.args and user.args[0] is node and self.order[user] < self.order[before]
            if module is not None and seen and self.calls[str(user.target)] == 1:
                conv = _plain(module)
                if conv is not None:
                    return EntryField(self._tap(node, user), conv.in_channels, conv)
                if isinstance(module, nn.BatchNorm2d):
                    return EntryField(self._tap(node, user), module.num_features, module)
        raise _Unsupported(f"no layer takes {node.name} alone, so the region's input cannot be seen")

    def _tap(self, node: fx.Node, user: fx.Node) -> Tap:
        if node not in self.taps:
            self.taps[node] = (Tap(), str(user.target))
        return self.taps[node][0]


def _may_pad(conv: nn.Conv2d) -> bool:
    """Whether the convolution can pad at all; whether it does may depend on the image size."""
    return any(any(zero_pads(conv, size, size)) for size in range(7, 15))


def _is_reader(conv: nn.Conv2d) -> bool:
    """Whether the class is a convolution of known meaning, so that its kernel can be slid further out."""
    return type(conv).__name__ in ("Conv2d", "Conv2dSame", "Conv2dSameExport")
