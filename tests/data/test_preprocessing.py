"""One picture, one input: against torchvision's transforms, and for every kind of picture people have."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.preprocessing import Preprocessing, to_rgb
from pipeline.errors import DataError
from pipeline.models.torchvision_repair import repair

repair()

from torchvision import transforms  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise, smoothed so that interpolation has something to do."""
    values = np.random.default_rng(seed).integers(0, 256, (height // 4 + 2, width // 4 + 2, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(20, 150),
    height=st.integers(20, 150),
    side=st.sampled_from([32, 33, 64]),
    fraction=st.sampled_from([0.875, 0.882, 0.95]),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
)
def test_evaluation_is_torchvisions_resize_and_centre_crop(
    width: int, height: int, side: int, fraction: float, interpolation: str
) -> None:
    picture = noise(width, height)
    reference = transforms.Compose(
        [
            transforms.Resize(round(side / fraction), transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    ours = Preprocessing(side, MEAN, STD, fraction, interpolation).eval_image(picture)
    torch.testing.assert_close(ours, reference(picture), rtol=0, atol=1e-6)


def test_crop_fraction_one_resizes_the_whole_picture() -> None:
    picture = noise(60, 28)
    pixels = Preprocessing(32, crop_fraction=1.0, interpolation="bilinear").eval_pixels(picture)
    assert np.array_equal(pixels, np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR)))


def test_a_grey_picture_is_its_rgb_copy() -> None:
    grey = noise(50, 40).convert("L")
    spec = Preprocessing(32)
    assert torch.equal(spec.eval_image(grey), spec.eval_image(grey.convert("RGB")))


def test_normalise_is_the_formula_in_double_precision() -> None:
    pixels = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = (pixels.numpy() / 255 - np.array(MEAN).reshape(3, 1, 1)) / np.array(STD).reshape(3, 1, 1)
    result = Preprocessing(5, MEAN, STD).normalise(pixels)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-6)
    one = Preprocessing(5, MEAN, STD).normalise(pixels[:, :1])
    assert torch.equal(one, Preprocessing(5, MEAN, STD).normalise(pixels[:, :1].repeat(1, 3, 1, 1)))


def test_transparency_is_laid_on_white() -> None:
    layered = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    layered.putpixel((0, 0), (0, 0, 0, 0))
    flat = to_rgb(layered)
    assert flat.getpixel((0, 0)) == (255, 255, 255)
    assert flat.getpixel((1, 1)) == (255, 127, 127)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.info["transparency"] = 0
    palette.putpixel((1, 1), 1)
    assert [to_rgb(palette).getpixel(at) for at in ((0, 0), (1, 1))] == [(255, 255, 255), (10, 20, 30)]
    assert to_rgb(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_deep_greys_keep_their_tone() -> None:
    deep = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert [to_rgb(deep).getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    upright = Image.new("RGB", (8, 4), "black")
    upright.paste("white", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: shown correctly after a clockwise quarter turn
    upright.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        shown = to_rgb(opened)
    assert shown.size == (4, 8)
    assert shown.getpixel((0, 0)) == (255, 255, 255) and shown.getpixel((0, 7)) == (0, 0, 0)


def test_training_depends_on_the_generator_alone() -> None:
    picture, spec = noise(90, 70), Preprocessing(32)

    def draw(seed: int) -> torch.Tensor:
        return spec.train_image(picture, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))


def test_training_crops_cover_the_asked_area_and_mirror_half() -> None:
    # Red counts columns, green counts rows: the crop can be read off the result.
    columns, rows = np.meshgrid(np.arange(200), np.arange(200))
    ramp = Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], axis=2).astype(np.uint8))
    spec = Preprocessing(16, (0.0,) * 3, (1.0,) * 3, min_area=0.3)
    areas, mirrored, aspects = [], 0, []
    for seed in range(300):
        image = spec.train_image(ramp, torch.Generator().manual_seed(seed)) * 255
        across, down = float(image[0, 8, -1] - image[0, 8, 0]), float(image[1, -1, 8] - image[1, 0, 8])
        mirrored += across < 0
        width, height = abs(across) * 16 / 15, down * 16 / 15
        areas.append(width * height / 200**2)
        aspects.append(width / height)
    assert 0.27 < min(areas) < 0.36 and max(areas) > 0.9
    assert min(aspects) < 0.85 and max(aspects) > 1.18
    assert min(aspects) > 0.7 and max(aspects) < 1.43
    assert 120 <= mirrored <= 180
    still = Preprocessing(16, (0.0,) * 3, (1.0,) * 3, flip=False)
    for seed in range(50):
        image = still.train_image(ramp, torch.Generator().manual_seed(seed))
        assert image[0, 8, -1] > image[0, 8, 0]


def test_extreme_shapes_fall_back_to_the_centre_square() -> None:
    thin = Image.new("RGB", (400, 4), "black")
    thin.paste("white", (190, 0, 210, 4))
    image = Preprocessing(8, (0.0,) * 3, (1.0,) * 3).train_image(thin, torch.Generator().manual_seed(0))
    assert image.min() == 1.0


def test_the_spec_survives_a_round_trip_through_plain_data() -> None:
    spec = Preprocessing(240, (0.5,) * 3, (0.5,) * 3, 0.882, "bilinear", 0.1, False)
    assert Preprocessing.from_dict(spec.as_dict()) == spec
    assert all(isinstance(value, (int, float, str, list, bool)) for value in spec.as_dict().values())


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"input_px": 0}, "input_px is 0"),
        ({"input_px": 8, "std": (0.2, 0, 0.2)}, "std is"),
        ({"input_px": 8, "mean": (0.5, 0.5)}, "mean has 2 values"),
        ({"input_px": 8, "crop_fraction": 1.2}, "crop_fraction is 1.2"),
        ({"input_px": 8, "interpolation": "nearest"}, "interpolation is 'nearest'"),
        ({"input_px": 8, "croop_fraction": 1.0}, "did you mean 'crop_fraction'"),
        ({"mean": (0.5, 0.5, 0.5)}, "'input_px' is missing"),
    ],
)
def test_wrong_specs_are_named(raw: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Preprocessing.from_dict(raw)
