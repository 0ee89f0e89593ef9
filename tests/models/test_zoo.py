"""Models by name."""

import subprocess
import sys

import pytest
import torch

from pipeline.errors import ModelError
from pipeline.models import small_mobilenet, zoo


@pytest.mark.parametrize("name", [*small_mobilenet.WIDTHS, "mobilenetv2_100", "tf_efficientnet_lite0"])
def test_models_answer_with_the_asked_classes(name: str) -> None:
    model = zoo.create(name, num_classes=7, input_px=32).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_small_mobilenet_has_the_promised_shape() -> None:
    model = zoo.create("mobilenetv2_cifar_050", num_classes=10, in_chans=1, input_px=32)
    residuals = [m for m in model.modules() if type(m).__name__ == "InvertedResidual"]
    strides = [m.conv_dw.stride for m in residuals]
    assert len(residuals) == 10 and strides.count((1, 1)) == 8
    maps: list[torch.Size] = []
    residuals[-1].register_forward_hook(lambda module, args, output: maps.append(output.shape))
    model.eval()(torch.zeros(1, 1, 32, 32))
    assert maps[0][2:] == (4, 4)
    # Two ReLU6 in each inverted residual, one each after stem, depthwise-separable block and head.
    assert sum(isinstance(m, torch.nn.ReLU6) for m in model.modules()) == 2 * 10 + 3


def test_macs_of_mobilenetv2_are_the_published_ones() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = zoo.create("mobilenetv2_100", num_classes=1000).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    # Sandler et al. 2018, table 4: 300 M multiply-adds.
    assert counter.get_total_flops() / 2 == pytest.approx(300e6, rel=0.01)


def test_unknown_names_name_the_nearest() -> None:
    with pytest.raises(ModelError, match="did you mean 'mobilenetv2_100'"):
        zoo.create("mobilnetv2_100", num_classes=10)


def test_arguments_reach_the_builder_and_wrong_ones_are_named() -> None:
    model = zoo.create("mobilenetv2_050", num_classes=10, args={"drop_rate": 0.25})
    assert model.drop_rate == 0.25
    with pytest.raises(ModelError, match="no_such_argument"):
        zoo.create("mobilenetv2_050", num_classes=10, args={"no_such_argument": 1})
    with pytest.raises(ModelError, match="no_such_argument"):
        zoo.create("mobilenetv2_cifar_050", num_classes=10, args={"no_such_argument": 1})


def test_networks_of_fixed_input_size_get_the_asked_size() -> None:
    model = zoo.create("vit_tiny_patch16_224", num_classes=3, input_px=64).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_importing_the_zoo_first_makes_timm_importable() -> None:
    code = "import pipeline.models.zoo, timm, torchvision.transforms.v2; print(timm.is_model('resnet18'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"


def test_the_repair_hides_no_other_failure(tmp_path: object) -> None:
    code = (
        "import sys\n"
        "class Broken:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torchvision': raise RuntimeError('broken elsewhere')\n"
        "sys.meta_path.insert(0, Broken())\n"
        "from pipeline.models.torchvision_repair import repair\n"
        "repair()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "broken elsewhere" in done.stderr
