"""How images are stored: plain values, for command lines and receipts."""

from __future__ import annotations

from dataclasses import dataclass

from data_prep.errors import UserError

FITS = ("shortest", "longest", "square")
ENCODINGS = ("jpg", "png", "webp")
KERNELS = ("hamming", "bicubic")


@dataclass(frozen=True)
class ImageRule:
    """How images are stored.

    size: side in pixels. fit: what gets that size: the "shortest" side, the "longest" side (both keep the shape and
        never enlarge), or both sides of a "square" (the shape is lost, as in the paper; small images are enlarged).
    encoding: "jpg", "png" or "webp", of images that must be encoded anew; quality: of jpg and webp.
    kernel: "hamming" (as sharp as averaging areas, without its steps; JPEGs are decoded at the smallest power of a half
        that suffices) or "bicubic" (sharper, for pages and evaluation; nearly twice the time).
    max_pixels: a file whose header promises more is refused undecoded.
    """

    size: int = 384
    fit: str = "shortest"
    encoding: str = "jpg"
    quality: int = 95
    kernel: str = "hamming"
    max_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        for value, known in ((self.fit, FITS), (self.encoding, ENCODINGS), (self.kernel, KERNELS)):
            if value not in known:
                raise UserError(f"images {value!r}: expected one of {', '.join(known)}")
        if self.size < 1 or not 1 <= self.quality <= 100 or self.max_pixels < 1:
            raise UserError(
                f"images of {self.size} pixels, quality {self.quality}, at most {self.max_pixels} pixels: "
                f"expected 1 or more, and a quality of 1 to 100"
            )
