"""How images are stored: untouched when they can be, upright, plain, never larger, never a bomb."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from data_prep.errors import UserError
from data_prep.image_rule import ImageRule
from data_prep.images import ImageRefused, store_image
from PIL import Image

SMALL = ImageRule(32)


def encoded(image: Image.Image, encoding: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, encoding, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def halves(size: tuple[int, int] = (80, 60)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, "red")
    image.paste("blue", (size[0] // 2, 0, *size))
    return image


@pytest.mark.parametrize(("encoding", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_what_has_the_right_size_stays_byte_for_byte(encoding, extension):
    data = encoded(halves((40, 32)), encoding)
    stored = store_image(data, SMALL)
    assert (stored.extension, stored.data, stored.encoded_anew) == (extension, data, False)


@pytest.mark.parametrize(
    ("fit", "size", "expected"),
    [
        ("shortest", (80, 60), (43, 32)),
        ("longest", (80, 60), (32, 24)),
        ("square", (80, 60), (32, 32)),
        ("shortest", (20, 900), (20, 900)),
        ("longest", (20, 10), (20, 10)),
        ("square", (20, 10), (32, 32)),
        ("longest", (5000, 2), (32, 1)),
    ],
)
def test_sizes(fit, size, expected):
    assert opened(store_image(encoded(halves(size)), ImageRule(32, fit)).data).size == expected


@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_all_eight_orientations_come_out_upright_and_are_stored_without_the_tag(encoding):
    upright = halves((80, 40))
    turns = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # what a camera did that wrote this number
    for number, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = number
        data = encoded(upright if turn is None else upright.transpose(turn), encoding, exif=exif, quality=95)
        image = opened(store_image(data, SMALL).data)
        assert image.size == (64, 32), number
        assert image.getexif().get(0x0112, 1) == 1
        left, right = np.asarray(image)[16, 8], np.asarray(image)[16, 56]
        assert left[0] > 200 > 50 > left[2], number
        assert right[2] > 200 > 50 > right[0], number


def test_a_rotated_image_with_a_damaged_tag_is_stored_upright():
    tags = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x011A, 2, 3, b"72")  # XResolution: a text
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    assert opened(store_image(encoded(halves((80, 40)), "JPEG", exif=exif), SMALL).data).size == (32, 64)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "I;16", "I", "F", "LA", "RGBA", "PA"])
def test_every_kind_of_pixel_becomes_grey_or_rgb_of_the_same_brightness(mode):
    grey = Image.new("L", (80, 60), 51)
    if mode == "I;16":
        image = Image.fromarray(np.full((60, 80), 51 * 257, dtype=np.uint16))
    elif mode == "I":
        image = Image.fromarray(np.full((60, 80), 51 * 257, dtype=np.int32))
    elif mode == "F":
        image = Image.fromarray(np.full((60, 80), 0.2, dtype=np.float32))
    elif mode == "1":
        grey, image = Image.new("L", (80, 60), 255), Image.new("1", (80, 60), 1)
    else:
        image = grey.convert("RGB").convert(mode) if mode != "PA" else grey.convert("LA").convert("PA")
    encoding = {"CMYK": "JPEG", "YCbCr": "JPEG", "F": "TIFF", "I": "TIFF"}.get(mode, "PNG")
    if mode == "PA":
        encoding, image = "PNG", grey.convert("P")
    stored = opened(store_image(encoded(image, encoding), SMALL).data)
    assert stored.mode in ("L", "RGB")
    assert np.abs(np.asarray(stored.convert("L")).astype(int) - grey.getpixel((0, 0))).max() <= 3


def test_grey_of_more_bits_keeps_its_brightness_however_dark_it_is():
    """32 bits do not say how many of them are used, so the largest value does; 16 bits are 16."""
    ramp = np.arange(60 * 80, dtype=np.int32).reshape(60, 80) % 256

    def stored(source, encoding="TIFF"):
        data = source if isinstance(source, bytes) else encoded(Image.fromarray(source), encoding)
        return np.asarray(opened(store_image(data, ImageRule(80, encoding="png")).data).convert("L")).astype(int)

    assert np.array_equal(stored(ramp), ramp)
    assert np.abs(stored(ramp * 257) - ramp).max() <= 1
    mask = (ramp % 2).astype(np.int32)
    assert np.array_equal(stored(mask), mask)
    dark = ramp.astype(np.uint16)
    pgm = b"P5 80 60 65535\n" + dark.astype(">u2").tobytes()
    for source in (dark, pgm):
        assert stored(source).max() <= 1
    assert stored(dark, "PNG").max() <= 1
    with pytest.raises(ImageRefused):
        stored(np.full((60, 80), np.nan, dtype=np.float32))


def test_transparent_parts_become_white():
    image = Image.new("RGBA", (80, 60), (0, 0, 0, 0))
    assert np.asarray(opened(store_image(encoded(image), SMALL).data)).min() >= 250
    palette = Image.new("P", (80, 60), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert np.asarray(opened(store_image(encoded(palette, transparency=0), SMALL).data)).min() >= 250


def test_the_first_frame_of_an_animation_is_taken():
    data = encoded(halves(), "GIF", save_all=True, append_images=[Image.new("RGB", (80, 60), "green")])
    image = opened(store_image(data, SMALL).data)
    assert getattr(image, "n_frames", 1) == 1
    assert np.asarray(image.convert("RGB"))[16, 5, 0] > 200


@pytest.mark.parametrize(("kernel", "different"), [("bicubic", 1.0), ("hamming", 2.0)])
def test_decoding_at_a_fraction_looks_as_decoding_in_full(kernel, different):
    wave = np.sin(np.linspace(0, 40, 1600))[None] * np.cos(np.linspace(0, 30, 1200))[:, None]
    image = Image.fromarray((wave * 100 + 128).astype(np.uint8)).convert("RGB")
    rule = ImageRule(96, encoding="png", kernel=kernel)
    fast = np.asarray(opened(store_image(encoded(image, "JPEG", quality=95), rule).data)).astype(int)
    full = np.asarray(image.resize((128, 96), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(fast - full).mean() < different


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 100) + b"IDAT" + zlib.compress(bytes(100))


@pytest.mark.parametrize(
    ("data", "rule", "reason"),
    [
        (b"", SMALL, "empty image file"),
        (b"GIF89a", SMALL, "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", SMALL, "not an image"),  # would start a program
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", SMALL, "not an image"),
        (png_header(50_000, 50_000), SMALL, "more pixels than allowed"),
        (png_header(20_000, 20_000), SMALL, "more pixels than allowed"),
        (encoded(halves()), ImageRule(32, max_pixels=80 * 60 - 1), "more pixels than allowed"),
        (encoded(halves())[:-30], SMALL, "broken image"),
        (encoded(halves((40, 32)), "JPEG")[:-30], SMALL, "broken image"),
        (encoded(Image.fromarray(np.full((60, 80), 70000, dtype=np.int32)), "TIFF"), SMALL, "broken image"),
        (encoded(Image.fromarray(np.full((60, 80), -1, dtype=np.int32)), "TIFF"), SMALL, "broken image"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_a_reason(data, rule, reason, monkeypatch):
    if "more pixels" in reason:
        monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded before the header was checked"))
    with pytest.raises(ImageRefused, match=f"^{reason}$"):
        store_image(data, rule)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow says what it finds odd
def test_noise_in_place_of_an_image_never_gives_another_error():
    noise = np.random.default_rng(0)
    for data in (encoded(halves(), encoding) for encoding in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")):
        for _ in range(40):
            damaged = np.frombuffer(data, dtype=np.uint8).copy()
            damaged[noise.integers(0, len(damaged), 8)] = noise.integers(0, 256, 8)
            try:
                store_image(damaged.tobytes(), ImageRule(32, max_pixels=10**6))
            except ImageRefused:
                continue


@pytest.mark.parametrize(
    "wrong", [{"fit": "cover"}, {"encoding": "gif"}, {"size": 0}, {"quality": 101}, {"kernel": "box"}]
)
def test_a_rule_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(UserError, match="expected"):
        ImageRule(**wrong)
