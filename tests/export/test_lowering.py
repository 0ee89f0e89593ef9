"""Lowering keeps the function, folds every BatchNorm and keeps the layers' names."""

import pytest
import torch
from tiny_models import ConvBlock, TinyNet, images, tiny_net
from torch import Tensor, fx, nn
from torch.nn import functional

from pipeline.errors import ExportError
from pipeline.export.int8 import Int8Options, operate
from pipeline.export.lowering import lower

EXAMPLE = torch.from_numpy(images(1))


def test_lowering_computes_what_the_model_computes_in_float64(network: TinyNet) -> None:
    lowered = lower(network, EXAMPLE)
    batch = torch.from_numpy(images(8, seed=3)).double()
    with torch.no_grad():
        expected = tiny_net().double()(batch)
        difference = (lowered.double()(batch) - expected).abs().max()
    # The folded weights are stored as float32, so float64 shows their rounding and nothing else.
    assert difference < 1e-6 * expected.abs().max()


def test_lowering_leaves_plain_layers_under_the_models_names(network: TinyNet) -> None:
    lowered = lower(network, EXAMPLE)
    layers = {name: type(layer) for name, layer in lowered.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    assert set(layers) == {
        "stem.0",
        "blocks.first.expand.0",
        "blocks.first.depthwise.0",
        "blocks.first.project.0",
        "blocks.folded",
        "head.0",
        "classifier",
    }
    assert not [layer for layer in lowered.modules() if isinstance(layer, nn.BatchNorm2d)]
    # No second copy of the weights either.
    assert list(lowered.buffers()) == []


def test_lowering_does_not_change_the_model() -> None:
    model = TinyNet().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lower(model, EXAMPLE)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_lowered_network_is_only_copied(network: TinyNet) -> None:
    once = lower(network, EXAMPLE)
    twice = lower(once, EXAMPLE)
    assert twice is not once
    assert [str(node.target) for node in twice.graph.nodes] == [str(node.target) for node in once.graph.nodes]


def test_padding_that_depends_on_the_size_becomes_constant() -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, stride=2)

        def forward(self, image: Tensor) -> Tensor:
            pads = []
            for size in reversed(image.shape[2:]):
                total = max((-(-size // 2) - 1) * 2 + 3 - size, 0)
                pads += [total // 2, total - total // 2]
            return self.conv(functional.pad(image, pads)).mean((2, 3))

    lowered = lower(Same(), EXAMPLE)
    pads = [node.args[1] for node in lowered.graph.nodes if "pad" in str(node.target)]
    assert pads == [[0, 1, 0, 1]]


def test_a_batchnorm_behind_a_shared_convolution_is_kept() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = ConvBlock(3, 4, 3, 1, 1, False)

        def forward(self, image: Tensor) -> Tensor:
            convolved = self.block[0](image)
            return (self.block[1](convolved) + convolved).mean((2, 3))

    lowered = lower(Shared().eval(), EXAMPLE)
    assert [layer for layer in lowered.modules() if isinstance(layer, nn.BatchNorm2d)]


def test_a_layer_that_runs_twice_becomes_two() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, image: Tensor) -> Tensor:
            return self.conv(self.conv(image)).mean((2, 3))

    lowered = lower(Twice(), EXAMPLE)
    assert {"conv", "conv_1"} <= set(dict(lowered.named_modules()))


def test_an_in_place_operation_is_seen_by_later_readers() -> None:
    class InPlace(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            features = image * 2.0
            functional.hardswish(features, inplace=True)
            return features.mean((2, 3)) + features.amax((2, 3))

    lowered = lower(InPlace(), EXAMPLE)
    batch = torch.from_numpy(images(1, seed=4))
    assert torch.equal(lowered(batch), InPlace()(batch.clone()))


def test_an_fx_graph_with_dotted_names_keeps_them(network: TinyNet) -> None:
    lowered = lower(fx.symbolic_trace(network), EXAMPLE)
    assert "blocks.first.depthwise.0" in dict(lowered.named_modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    model = tiny_net()
    with torch.no_grad():
        model.blocks["folded"].bias[2] = value
    with pytest.raises(ExportError, match=r"'blocks\.folded\.bias' holds 1 of 8 values"):
        lower(model, EXAMPLE)


def test_control_flow_that_depends_on_the_image_is_refused() -> None:
    class Dynamic(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image[image > 0.5][:5]

    with pytest.raises(ExportError, match="size depends on the image"):
        lower(Dynamic(), EXAMPLE)


def test_two_outputs_are_refused() -> None:
    class Two(nn.Module):
        def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
            return image.mean((2, 3)), image.amax((2, 3))

    with pytest.raises(ExportError, match="2 outputs, expected 1"):
        lower(Two(), EXAMPLE)


def test_an_example_without_batch_dimension_is_refused(network: TinyNet) -> None:
    with pytest.raises(ExportError, match=r"shape \(3, 32, 32\), expected \[N, C, H, W\]"):
        lower(network, EXAMPLE[0])


class _Reshaped(nn.Module):
    """The ways in which people flatten before the classifier."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.classifier, self.how = nn.Conv2d(3, 8, 3, 4, 1), nn.Linear(8 * 4, 10), how

    def forward(self, image: Tensor) -> Tensor:
        x = functional.avg_pool2d(functional.relu(self.conv(image)), 4)
        if self.how == "view":
            return self.classifier(x.view(x.size(0), -1))
        return self.classifier(x.reshape(x.shape[0], 8, -1).transpose(1, 2).reshape(x.shape[0], -1))


@pytest.mark.parametrize("how", ["view", "reshape"])
@pytest.mark.parametrize("traced_batch", [1, 3])
def test_a_network_that_reshapes_runs_batches_of_any_size(how: str, traced_batch: int) -> None:
    torch.manual_seed(0)
    model = _Reshaped(how).eval()
    batch = torch.from_numpy(images(7, seed=5))
    lowered = lower(model, torch.zeros(traced_batch, 3, 32, 32))
    assert torch.allclose(lowered(batch), model(batch), atol=1e-5)
    operated = operate(lowered, [batch.numpy()], Int8Options(equalise=True)).network
    assert operated(batch).shape == (7, 10)


class _LateNorm(nn.Module):
    """A BatchNorm1d that no layer can take in, since a ReLU lies between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)
        nn.init.uniform_(self.norm.running_mean)

    def forward(self, image: Tensor) -> Tensor:
        return self.last(self.norm(torch.relu(self.first(image.mean((2, 3))))))


def test_a_batch_norm_of_vectors_behind_an_activation_stays_one() -> None:
    model, batch = _LateNorm().eval(), torch.from_numpy(images(4))
    lowered = lower(model, EXAMPLE)
    assert torch.allclose(lowered(batch), model(batch), atol=1e-5)


class _Dictionary(nn.Module):
    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"logits": image.mean((2, 3))}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), "BatchNorm '1' keeps no"),
        (_Dictionary(), "returns a dict"),
    ],
)
def test_what_cannot_be_lowered_is_named(model: nn.Module, words: str) -> None:
    with pytest.raises(ExportError, match=words):
        lower(model, EXAMPLE)


def test_surgery_without_images_is_refused(network: TinyNet) -> None:
    with pytest.raises(ExportError, match="no calibration images"):
        operate(lower(network, EXAMPLE), [], Int8Options())
