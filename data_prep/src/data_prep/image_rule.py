"""How images are stored: plain values, for command lines and receipts; imports no imaging library."""

from __future__ import annotations

from dataclasses import dataclass

from data_prep.errors import UserError

FITS = ("shortest", "longest", "square")
ENCODINGS = ("jpg", "png", "webp")
KERNELS = ("hamming", "bicubic")


@dataclass(frozen=True)
class ImageRule:
    """How images are stored.

    size: in pixels. fit: what gets that size: the "shortest" side, the "longest" side (both keep the aspect ratio and
        never enlarge), or both sides of a "square" (the aspect ratio is lost, as in the paper; small images grow).
    encoding: "jpg", "png" or "webp", for images that cannot be stored as they are; quality: of jpg and webp.
    kernel: "hamming" (as sharp as area averaging, with fewer artefacts; JPEGs are decoded at the smallest power of 1/2
        that is large enough) or "bicubic" (sharper, for pages and evaluation; nearly twice the time).
    max_pixels: a file whose header says more is refused before decoding.
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
        if not 1 <= self.size <= 16_383 or not 1 <= self.quality <= 100 or self.max_pixels < 1:
            raise UserError(
                f"images of {self.size} pixels, quality {self.quality}, at most {self.max_pixels} pixels: "
                f"expected 1 to 16383 pixels a side (what WebP holds), a quality of 1 to 100, and 1 pixel or more"
            )
