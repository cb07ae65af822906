"""`load_pixels` gives what `load_image` gives, whichever library decodes: the same pixels, the same errors."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from vision_tower import ImageError, load_image, load_pixels


@pytest.fixture
def decoded(monkeypatch):
    """How many JPEGs simplejpeg decodes."""
    import simplejpeg

    count, decode = [], simplejpeg.decode_jpeg

    def counting(*arguments):
        count.append(1)
        return decode(*arguments)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", counting)
    return count


def same(source, **options) -> bool:
    """Whether both take the source; if so, they agree on its pixels, else on what is wrong with it."""
    try:
        expected = np.asarray(load_image(source, **options))
    except ImageError as error:
        reason = str(error)
    else:
        reason = ""
    if reason:
        with pytest.raises(ImageError) as found:
            load_pixels(source, **options)
        assert str(found.value) == reason
        return False
    pixels = load_pixels(source, **options)
    assert pixels.dtype == torch.uint8
    assert pixels.stride(0) == 1, "channels last"
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)
    pixels.zero_()  # memory of its own, that may be written to
    return True


def test_colour_jpegs_have_pillows_pixels_however_they_were_written(encoded, decoded):
    generator = np.random.default_rng(0)
    count = 0
    for height, width in ((1, 1), (3, 17), (64, 48), (75, 131)):
        smooth = Image.fromarray(generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height))
        noise = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for picture in (smooth, noise):
            for options in (
                *({"subsampling": sampling, "quality": 90} for sampling in (0, 1, 2)),
                {"quality": 5},
                {"progressive": True},
                {"optimize": True, "restart_marker_blocks": 2},
                {"keep_rgb": True},
                {"comment": b"x" * 300, "dpi": (72, 72)},
            ):
                count += 1
                assert same(encoded(picture, "JPEG", **options))
    assert len(decoded) == count


@pytest.mark.parametrize("installed", [True, False])
def test_every_kind_of_image_is_the_one_that_load_image_gives(
    photo, encoded, tmp_path, monkeypatch, decoded, installed
):
    if not installed:
        module = sys.modules[load_pixels.__module__]  # whose name is also a function's
        monkeypatch.setattr(module, "_simplejpeg", lambda: None)
    grey, clear = photo.convert("L"), photo.convert("RGBA")
    clear.putalpha(grey)
    deep = Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8))
    sources = [
        *(encoded(of, "PNG") for of in (photo, grey, clear, deep, photo.quantize(9))),
        *(encoded(of, "JPEG") for of in (grey, photo.convert("CMYK"))),
        encoded(clear, "WEBP"), encoded(photo, "GIF"), photo, grey,
        np.asarray(photo), torch.tensor(np.asarray(photo)).permute(2, 0, 1),
    ]  # fmt: skip
    (tmp_path / "a.jpg").write_bytes(encoded(photo, "JPEG"))
    assert all(map(same, [*sources, tmp_path / "a.jpg"]))
    assert not decoded
    assert same(encoded(photo, "JPEG"))
    assert len(decoded) == installed
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert same(encoded(photo, "JPEG", exif=exif))


def test_a_broken_jpeg_is_what_pillow_says_it_is(photo, encoded, decoded):
    """Cut anywhere, and with changed bytes: what libjpeg-turbo repairs with a warning has Pillow's pixels, too."""
    generator = np.random.default_rng(0)
    taken = set()
    for options in ({}, {"progressive": True}, {"subsampling": 0, "restart_marker_blocks": 1}):
        whole = encoded(photo.resize((45, 30)), "JPEG", **options)
        for length in range(0, len(whole), 40):
            taken.add(same(whole[:length], name="cut"))
        for _ in range(150):
            data = bytearray(whole)
            for place in generator.integers(0, len(whole), generator.integers(1, 4)):
                data[place] = generator.integers(0, 256)
            taken.add(same(bytes(data), name="changed", max_pixels=10**6))
    assert taken == {True, False}
    assert decoded


def test_too_many_pixels_are_refused_from_the_header(photo, encoded, decoded):
    with pytest.raises(ImageError, match="sample 7 is 90x60 pixels, more than the 5,399 allowed"):
        load_pixels(encoded(photo, "JPEG"), max_pixels=5_399, name="sample 7")
    assert not decoded
    assert same(encoded(photo, "JPEG"), max_pixels=5_400)
