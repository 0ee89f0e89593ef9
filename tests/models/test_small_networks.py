"""The CIFAR networks and MLPs against the sizes that their papers print."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import ModelError
from pipeline.models import cifar_resnet, cifar_vgg, mlp, zoo


def macs(model: nn.Module, px: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, px, px))
    return counter.get_total_flops() // 2


# He et al. 2016, table 6, prints 0.27M, 0.46M, 0.66M and 0.85M.
@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_resnets_have_the_papers_size(depth: int, millions: float) -> None:
    model = zoo.create(f"cifar_resnet{depth}", num_classes=10, input_px=32)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert round(trained / 1e6, 2) == millions
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m.weight.requires_grad]
    assert len(layers) == depth
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_resnet20_macs() -> None:
    # 40.55M for the convolutions and the classifier, by hand; the fixed shortcuts add 2·131072.
    by_hand = 3 * 16 * 9 * 1024 + 6 * 16 * 16 * 9 * 1024
    by_hand += (16 * 32 + 5 * 32 * 32) * 9 * 256 + (32 * 64 + 5 * 64 * 64) * 9 * 64 + 640
    assert macs(zoo.create("cifar_resnet20", num_classes=10), 32) == by_hand + 2 * 131072


def test_fixed_shortcut_is_subsampling_with_zero_channels() -> None:
    x = torch.randn(2, 4, 6, 6)
    block = cifar_resnet.BasicBlock(4, 8, 2, projection=False)
    expected = torch.zeros(2, 8, 3, 3)
    expected[:, 2:6] = x[:, :, ::2, ::2]
    torch.testing.assert_close(block.shortcut(x), expected, rtol=0, atol=0)
    assert not any(p.requires_grad for p in block.shortcut.parameters())


def test_vggs_have_the_tables_layers() -> None:
    # Simonyan and Zisserman print 138M and 144M with 123.6M in the fully connected layers.
    for name, convs, millions in (("cifar_vgg16", 13, 14.7), ("cifar_vgg19", 16, 20.0)):
        model = zoo.create(name, num_classes=10, input_px=32)
        kernels = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert len(kernels) == convs
        assert sum(m.weight.numel() for m in kernels) / 1e6 == pytest.approx(millions, abs=0.05)
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_mlp_depth_counts_its_layers() -> None:
    for name in mlp.NAMES:
        model = zoo.create(name, num_classes=10, in_chans=1, input_px=28)
        depth = int(name.split("_")[1])
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        assert len(layers) == depth
        assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == depth - 1
        hidden = 784 * 256 + 256 + (depth - 2) * (256 * 256 + 256)
        assert sum(p.numel() for p in model.parameters()) == hidden + 2570
        assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("cifar_resnet20", {"widht": 2}, "no argument 'widht'"),
        ("cifar_resnet20", {"shortcut": "C"}, "shortcut is 'C'"),
        ("cifar_resnet20", {"width": 0}, "width is 0"),
        ("cifar_vgg16", {"width": -1.0}, r"width is -1\.0"),
        ("mlp_4", {"width": 2.5}, r"width is 2\.5"),
    ],
)
def test_wrong_arguments_are_named(name: str, args: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        zoo.create(name, num_classes=10, input_px=32, args=args)


def test_vgg_refuses_images_that_vanish() -> None:
    with pytest.raises(ModelError, match="28 px"):
        zoo.create("cifar_vgg16", num_classes=10, input_px=28)


def test_width_scales_channels() -> None:
    model = cifar_resnet.build("cifar_resnet20", num_classes=10, args={"width": 0.5, "shortcut": "B"})
    assert model.get_submodule("layer3.0.conv1").get_parameter("weight").shape == (32, 16, 3, 3)
    assert cifar_vgg.build("cifar_vgg16", num_classes=2, args={"width": 0.125})(torch.zeros(1, 3, 32, 32)).shape == (
        1,
        2,
    )
