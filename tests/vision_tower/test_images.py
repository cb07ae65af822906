"""Whatever kind of image comes in, the right pixels come out, or an error that names the image."""

import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from vision_tower import ImageError, load_image, normalize, preprocess, preprocess_native
from vision_tower.preprocess import MEAN, STD


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_paths_bytes_pil_arrays_and_tensors_give_the_same_pixels(photo, encoded, tmp_path):
    data = encoded(photo, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    array = np.asarray(photo)
    sources = [tmp_path / "a.png", str(tmp_path / "a.png"), data, photo, array, torch.tensor(array).permute(2, 0, 1)]
    for source in sources:
        assert np.array_equal(pixels(load_image(source)), array)
    photo.load()  # the caller's image is not closed


def test_grey_palette_and_cmyk_images_keep_their_colours(photo, encoded):
    grey = photo.convert("L")
    assert np.array_equal(pixels(load_image(encoded(grey, "PNG")))[..., 1], np.asarray(grey))
    palette = photo.quantize(64)
    assert np.array_equal(pixels(load_image(encoded(palette, "GIF"))), pixels(palette.convert("RGB")))
    bits = Image.fromarray(np.eye(8) > 0)
    assert np.array_equal(pixels(load_image(encoded(bits, "PNG")))[..., 2], 255 * np.eye(8))
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # pure red ink
    assert np.abs(pixels(load_image(encoded(cmyk, "JPEG"))) - [255, 0, 0]).max() <= 3


def test_sixteen_bit_grey_is_scaled_and_not_clipped(encoded):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    expected = np.round(values / 257)
    for source in (encoded(Image.fromarray(values), "PNG"), encoded(Image.fromarray(values), "TIFF"), values):
        assert np.array_equal(pixels(load_image(source))[..., 0], expected)
    clear = encoded(Image.fromarray(values), "PNG", transparency=int(values[0, 3]))
    expected[0, 3] = 255
    assert np.array_equal(pixels(load_image(clear))[..., 0], expected)


def test_grey_of_32_bits_is_read_by_its_largest_value_and_16_bits_by_their_depth(encoded):
    eight = np.arange(64, dtype=np.int32).reshape(8, 8) * 4
    for source in (Image.fromarray(eight), encoded(Image.fromarray(eight), "TIFF")):
        assert np.array_equal(pixels(load_image(source))[..., 1], eight)
    for scale in (2, 257):
        wide = Image.fromarray(eight * scale)
        assert np.array_equal(pixels(load_image(wide))[..., 1], np.round(eight * scale / 257))
    # A dark image of 16 bits stays dark, also where Pillow reads it as 32.
    dark = (eight // 2).astype(np.uint16)
    pgm = b"P5 8 8 65535\n" + dark.astype(">u2").tobytes()
    for source in (dark, encoded(Image.fromarray(dark), "PNG"), encoded(Image.fromarray(dark), "TIFF"), pgm):
        assert pixels(load_image(source)).max() == 0
    for wrong in (eight * 1000, eight - 1):
        with pytest.raises(ImageError, match="grey values from .* 16 bits hold 0 to 65535"):
            load_image(Image.fromarray(wrong))


def test_transparency_is_laid_over_white(encoded):
    rgba = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    rgba.paste((0, 0, 200, 255), (0, 0, 2, 4))
    rgba.paste((0, 0, 0, 51), (2, 0, 3, 4))
    for source in (rgba, encoded(rgba, "PNG"), encoded(rgba, "WEBP", lossless=True), np.asarray(rgba)):
        row = pixels(load_image(source))[0].tolist()
        assert row == [[0, 0, 200], [0, 0, 200], [204, 204, 204], [255, 255, 255]]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert pixels(load_image(encoded(palette, "PNG", transparency=1))).min() == 255
    grey = Image.merge("LA", [Image.new("L", (4, 4), 7), Image.new("L", (4, 4), 0)])
    assert pixels(load_image(encoded(grey, "PNG"))).min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(photo, encoded, orientation):
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation to the transposition that a camera would have made
    stored = photo if orientation == 1 else photo.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "TIFF"):
        loaded = load_image(encoded(stored, kind, exif=exif))
        assert np.array_equal(pixels(loaded), pixels(photo))
        assert np.array_equal(pixels(load_image(loaded)), pixels(photo))  # and is not turned again


def test_a_rotated_image_with_a_damaged_tag_is_read(photo, encoded):
    tags = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x011A, 2, 3, b"72")  # XResolution: a text
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    upright = photo.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(pixels(load_image(encoded(photo, "PNG", exif=exif))), pixels(upright))


def test_an_animation_gives_its_first_frame(encoded):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert np.abs(pixels(load_image(data)) - [255, 0, 0]).max() <= 2


def test_too_many_pixels_are_refused_from_the_header(png_header, tmp_path):
    path = tmp_path / "huge.png"
    for size in (20_000, 13_378):
        path.write_bytes(png_header(size, size))
        with pytest.raises(ImageError, match=r"huge\.png is larger|huge\.png is 13378x13378 pixels, more than"):
            load_image(path)
    with pytest.raises(ImageError, match=r"sample 7 is 100x90 pixels.*max_pixels"):
        load_image(png_header(100, 90), max_pixels=8_999, name="sample 7")
    with pytest.raises(ImageError, match="cannot be decoded"):  # the header passes, the pixels are not there
        load_image(png_header(100, 90), max_pixels=9_000)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_a_truncated_file_is_an_error_that_names_it(photo, encoded, kind, tmp_path):
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    data = encoded(noisy, kind)
    path = tmp_path / "cut"
    for length in (0, 10, len(data) // 2):
        path.write_bytes(data[:length])
        with pytest.raises(ImageError, match=r"cut cannot be decoded.*replace or skip"):
            load_image(path)


def test_what_is_no_image_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ImageError, match=r"notes\.txt"):
        load_image(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match="absent"):
        load_image(tmp_path / "absent.png")
    for wrong in (
        np.zeros((4, 4, 3)),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((0, 4), np.uint8),
        np.zeros(4, np.uint8),
    ):
        with pytest.raises(ImageError, match=r"ndarray is .*expected uint8"):
            load_image(wrong)
    with pytest.raises(ImageError, match=r"expected a uint8 tensor \[3, H, W\]"):
        load_image(torch.zeros(3, 4, 4))
    with pytest.raises(ImageError, match=r"torch\.uint8 \[3, 0, 5\]"):
        load_image(torch.zeros(3, 0, 5, dtype=torch.uint8))
    with pytest.raises(ImageError, match="expected a path"):
        load_image(None)
    with pytest.raises(ImageError, match="floating-point"):
        load_image(Image.fromarray(np.zeros((4, 4), np.float32)))


@pytest.mark.parametrize("size", [(90, 60), (61, 97), (48, 48), (20, 30), (401, 40), (10, 301), (400, 20), (1, 1)])
@pytest.mark.parametrize("resolution", [(48, 48), (32, 80), (99, 20), (8, 200)])
def test_preprocess_equals_timms_transform(size, resolution):
    from timm.data import create_transform

    noise = np.random.default_rng(0).integers(0, 2, (*size, 3), dtype=np.uint8) * 255  # every pixel an edge
    image = Image.fromarray(noise)
    options = {"interpolation": "bicubic", "crop_pct": 1.0, "normalize": False}
    assert torch.equal(preprocess(image, resolution), create_transform((3, *resolution), **options)(image))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("resolution", [(32, 32), (33, 33), (20, 31), (30, 30)])
def test_every_crop_equals_timms_transform_where_halves_fall_too(mode, resolution):
    """Sizes that leave one, three, five … pixels to share between two sides, and sides that scale to a half."""
    from timm.data import create_transform

    generator = np.random.default_rng(0)
    for size in ((90, 60), (61, 97), (64, 67), (67, 64), (65, 64), (31, 34), (20, 41), (7, 13), (45, 32), (32, 45)):
        image = Image.fromarray(generator.integers(0, 2, (*size, 3), dtype=np.uint8) * 255)
        for crop_pct, interpolation in ((1.0, "bicubic"), (0.875, "bilinear"), (0.9, "nearest"), (0.77, "lanczos")):
            options = {"crop_pct": crop_pct, "crop_mode": mode, "interpolation": interpolation}
            expected = create_transform((3, *resolution), normalize=False, mean=MEAN, std=STD, **options)(image)
            assert torch.equal(preprocess(image, resolution, **options), expected), (size, options)


def test_preprocess_says_what_it_cannot_do(photo):
    for options in ({"crop_pct": 0.0}, {"crop_pct": 1.01}, {"crop_mode": "longest"}, {"interpolation": "random"}):
        name, value = next(iter(options.items()))
        with pytest.raises(ValueError, match=f"{name} is {value!r}; expected"):
            preprocess(photo, 48, **options)


def test_preprocess_covers_a_resolution_that_is_not_square(photo):
    assert preprocess(photo, (32, 80)).shape == (3, 32, 80)
    wide = photo.resize((80, 53), Image.Resampling.BICUBIC).crop((0, 10, 80, 42))
    assert np.array_equal(preprocess(photo, (32, 80)).permute(1, 2, 0).numpy(), np.asarray(wide))
    assert preprocess(photo, (80, 32)).shape == (3, 80, 32)


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000)])
def test_a_long_strip_does_not_grow_into_a_huge_image(size, monkeypatch):
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, to, *rest: sizes.append(to) or resize(self, to, *rest))
    assert preprocess(Image.new("RGB", size, "red"), 224).float().mean(dim=(1, 2)).tolist() == [255, 0, 0]
    assert sizes == [(224, 224)]


@pytest.mark.parametrize("size", [(300, 7), (7, 300), (90, 60)])
def test_the_centre_of_a_long_strip_is_where_it_was(photo, size, monkeypatch):
    image = photo.resize(size)
    whole = preprocess(image, 48)
    monkeypatch.setattr(sys.modules["vision_tower.preprocess"], "MAX_RESIZED", 0)
    assert (preprocess(image, 48).int() - whole.int()).abs().max() <= 1


def test_normalize_equals_torchvision():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    reference = v2.functional.normalize(images.float() / 255, MEAN, STD)
    torch.testing.assert_close(normalize(images), reference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(normalize(images[0]), reference[0], rtol=1e-5, atol=1e-6)
    other = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    reference = v2.functional.normalize(images.float() / 255, *other)
    torch.testing.assert_close(normalize(images, *other), reference, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="expected uint8"):
        normalize(images.float())


@pytest.mark.parametrize("kind", ["noise", "black and white", "smooth"])
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_tensor_gives_pillows_pixels_to_the_last_level(kind, contiguous):
    """Up and down, wide and tall, against Pillow's own resize of the interleaved image."""
    generator = np.random.default_rng(0)
    for _ in range(40):
        height, width, resolution = (int(side) for side in generator.integers(8, 300, 3))
        array = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if kind == "black and white":
            array = ((array > 127) * 255).astype(np.uint8)
        if kind == "smooth":
            array = np.asarray(Image.fromarray(array[::8, ::8]).resize((width, height)))
        tensor = torch.tensor(array).permute(2, 0, 1)  # channels last in memory
        pixels = preprocess_native(tensor.contiguous() if contiguous else tensor, patch=1, max_patches=resolution**2)
        expected = Image.fromarray(array).resize((pixels.shape[2], pixels.shape[1]), Image.Resampling.BICUBIC)
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(expected))
        assert torch.equal(preprocess(tensor, resolution), preprocess(array, resolution))


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((100, 100), (6, 6)),
        ((200, 100), (8, 4)),
        ((60, 90), (4, 7)),
        ((1, 1), (6, 6)),
        ((1, 20_000), (1, 36)),
        ((20_000, 1), (36, 1)),
        ((30, 31), (5, 6)),
        ((17, 17), (6, 6)),  # sqrt(36 / 17**2) * 17 is 5.999…
    ],
)
def test_native_aspect_keeps_the_shape_within_the_budget(size, grid):
    pixels = preprocess_native(np.zeros((*size, 3), np.uint8), patch=8, max_patches=36)
    assert pixels.shape == (3, grid[0] * 8, grid[1] * 8)
    assert pixels.is_contiguous()


def test_native_aspect_cuts_nothing_off(photo):
    """A frame around the picture is still there, where the centre crop has lost it."""
    page = Image.new("RGB", (90, 60), "red")
    page.paste(photo.resize((70, 40)), (10, 10))
    pixels = preprocess_native(page, patch=8, max_patches=36)
    for edge in (pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]):
        assert edge[0].min() > 200
        assert edge[1:].max() < 60
    assert preprocess(page, 48)[0, :, 0].min() < 100
    with pytest.raises(ValueError, match="max_patches 0"):
        preprocess_native(page, patch=8, max_patches=0)
