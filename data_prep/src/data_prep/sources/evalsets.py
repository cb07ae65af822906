"""Evaluation sets of captioned photos, as pools for the evaluator: Crossmodal-3600, XTD10, Flickr30k, COCO.

Every caption is kept, in the order of the source. Those that published figures use have the role "name", which the
evaluator reads: all five of Flickr30k and COCO; of Crossmodal-3600 the first in each language, as in LAION's
loader.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data_prep.errors import UserError
from data_prep.image_rule import ImageRule
from data_prep.samples import Text
from data_prep.shards.format import IMAGE_TYPES, JsonObject, parse_json
from data_prep.sources.folder import inside
from data_prep.sources.ids import same_id
from data_prep.sources.records import Dropped, Found, ImageRecord, argument, file_stat, option
from data_prep.sources.tars import TarSample, tar_samples
from data_prep.sources.texts import files_in

_IMAGES = 500
_OTHER_FORMAT = (OSError, ValueError, KeyError, TypeError, AttributeError)

Photo = tuple[str, list[Text]]  # file name below the folder of images, captions


@dataclass(frozen=True)
class _Photos(ABC):
    """Base class: a small list of captions, which every piece reads whole, and a folder of images."""

    image: ClassVar[ImageRule | None] = ImageRule(512, kernel="bicubic")

    captions: str
    images: str

    @abstractmethod
    def photos(self) -> list[Photo]:
        """All images of the set. One of `_OTHER_FORMAT` if the list has another format."""

    def pieces(self) -> Iterator[JsonObject]:
        if not Path(self.images).is_dir():
            raise UserError(f"{self.images}: no such folder")
        try:
            photos = self.photos()
            if odd := [name for name, _ in photos if not isinstance(name, str)]:
                raise TypeError(f"an image is called {odd[0]!r:.80}")
            count = len(photos)
        except _OTHER_FORMAT as error:
            raise UserError(f"{self.captions}: not the captions of this set ({error!r})") from error
        captions = Path(self.captions)
        stamps = [file_stat(path) for path in (sorted(captions.glob("*.txt")) if captions.is_dir() else [captions])]
        for first in range(0, count, _IMAGES):
            yield {"first": first, "end": min(first + _IMAGES, count), "stamps": stamps}

    def read(self, piece: JsonObject) -> Iterator[Found]:
        for name, captions in self.photos()[piece["first"] : piece["end"]]:
            path = inside(Path(self.images), name)
            if path is None:
                yield Dropped("file name outside the folder", name)
            elif not captions:
                yield Dropped("no caption", name)
            else:
                yield ImageRecord(name, name, path, captions)


@dataclass(frozen=True)
class Xm3600(_Photos):
    """Crossmodal-3600: captions.jsonl and the folder of KEY.jpg

    36 languages, about two captions in each; the first is evaluated.
    """

    captions: str = argument("captions.jsonl")
    images: str = argument("folder of the images")

    def photos(self) -> list[Photo]:
        found = []
        for line in filter(None, _lines(Path(self.captions))):
            fields = parse_json(line)
            captions = [
                Text(text, language, "further" if number else "name")
                for language, value in fields.items()
                if isinstance(value, dict)
                for number, text in enumerate(filter(None, map(str.strip, _listed(value["caption"]))))
            ]
            found.append((f"{fields['image/key']}.jpg", captions))
        return found


@dataclass(frozen=True)
class Xtd10(_Photos):
    """XTD10 (multilingual COCO): the folder of its text files and the COCO images

    test_image_names.txt names the images, line by line test_1kcaptions_LANGUAGE.txt holds their captions.
    """

    captions: str = argument("folder of test_image_names.txt and test_1kcaptions_LANGUAGE.txt")
    images: str = argument("folder of the images, or the one that holds train2014 and val2014")

    def photos(self) -> list[Photo]:
        folder = Path(self.captions)
        names = _lines(folder / "test_image_names.txt")
        texts: list[list[Text]] = [[] for _ in names]
        for path in sorted(folder.glob("test_1kcaptions_*.txt")):
            code = path.stem.rpartition("_")[2]
            lines = _lines(path)
            if len(lines) != len(names):
                raise UserError(f"{path}: has {len(lines)} lines, test_image_names.txt {len(names)}; expected as many")
            for own, line in zip(texts, lines, strict=True):
                if line:
                    own.append(Text(line, code, "name"))
        return [(_coco_name(Path(self.images), name), own) for name, own in zip(names, texts, strict=True)]


@dataclass(frozen=True)
class Flickr30k(_Photos):
    """Flickr30k: LAION's flickr30k_test_karpathy.txt and the folder of images

    After a first line, NAME.jpg,CAPTION; five captions an image.
    """

    captions: str = argument("flickr30k_test_karpathy.txt")
    images: str = argument("folder of the images")

    def photos(self) -> list[Photo]:
        found: dict[str, list[Text]] = {}
        for line in _lines(Path(self.captions))[1:]:
            name, comma, text = line.partition(".jpg,")  # captions hold commas and are not quoted
            if not comma:
                raise UserError(f"{self.captions}: expected NAME.jpg,CAPTION, found {line[:80]!r}")
            found.setdefault(f"{name}.jpg", []).append(Text(text.strip(), "en", "name"))
        return list(found.items())


@dataclass(frozen=True)
class Coco(_Photos):
    """COCO: LAION's coco_test_karpathy.json and the folder of images

    Five captions an image, in the schema of COCO's own caption files, which can be given too.
    """

    captions: str = argument("coco_test_karpathy.json")
    images: str = argument("folder of the images, or the one that holds val2014")

    def photos(self) -> list[Photo]:
        content = parse_json(Path(self.captions).read_bytes())
        captions: dict[Any, list[Text]] = {same_id(image["id"]): [] for image in content["images"]}
        for annotation in content["annotations"]:
            captions[same_id(annotation["image_id"])].append(Text(annotation["caption"].strip(), "en", "name"))
        return [
            (_coco_name(Path(self.images), image["file_name"]), captions[same_id(image["id"])])
            for image in content["images"]
        ]


@dataclass(frozen=True)
class WdsPhotos:
    """Flickr30k or COCO as LAION's ready-made tars: an image and a caption a line

    The test split of clip-benchmark/wds_flickr30k or wds_mscoco_captions. A backslash and n in a caption stand for a
    line break. `--name flickr30k` or `--name coco` says which set it is.
    """

    image: ClassVar[ImageRule | None] = ImageRule(512, kernel="bicubic")

    files: tuple[str, ...] = argument("tars of the test split, or folders of them")
    language: str = option("en", "language of the captions")

    def pieces(self) -> Iterator[JsonObject]:
        for path in files_in(self.files, (".tar",)):
            yield {"file": str(path), **file_stat(path)}

    def read(self, piece: JsonObject) -> Iterator[Found]:
        path = Path(piece["file"])
        for sample in tar_samples(path):
            if not isinstance(sample, TarSample):
                yield sample
                continue
            where = f"{path.name}: {sample.name}"
            kind = next((kind for kind in IMAGE_TYPES if kind in sample.members), None)
            if kind is None or "txt" not in sample.members:
                yield Dropped("no image" if kind is None else "no caption", where)
                continue
            try:
                lines = sample.read("txt").decode("utf-8-sig").split("\n")
            except UnicodeDecodeError:
                yield Dropped("captions that are not UTF-8", where)
                continue
            captions = [Text(text, self.language, "name") for line in lines if (text := _unescaped(line))]
            if captions:
                yield ImageRecord(where, sample.name, sample.read(kind), captions)
            else:
                yield Dropped("no caption", where)


def _unescaped(line: str) -> str:
    return line.replace("\\n", "\n").strip()


def _listed(captions: Any) -> list[Any]:
    """The captions themselves; TypeError for a single text, whose letters would be taken for captions."""
    if not isinstance(captions, list):
        raise TypeError(f"captions {captions!r:.80} are no list")
    return captions


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8-sig").removesuffix("\n")
    return [line.strip() for line in text.split("\n")]  # not `splitlines`, which also splits inside captions


def _coco_name(folder: Path, name: str) -> str:
    """The name of a COCO image below `folder`, which may be the one above val2014 and train2014."""
    years = [f"{year}/{name}" for year in ("val2014", "train2014") if f"_{year}_" in name]
    return years[0] if years and (folder / years[0]).exists() else name
