"""WIT, the Wikipedia image-text set: its TSV with a folder of images, or an img2dataset download of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

from data_prep.errors import UserError
from data_prep.image_rule import ImageRule
from data_prep.samples import Text
from data_prep.shards.format import JsonObject
from data_prep.sources.dialects import Said
from data_prep.sources.folder import inside
from data_prep.sources.img2dataset import image_record, read_shard, shard_pieces
from data_prep.sources.records import Dropped, Found, ImageRecord, argument, from_rows, option
from data_prep.sources.tables import open_table, read_table
from data_prep.sources.texts import files_in

COLUMNS = tuple(
    "language page_url image_url page_title section_title hierarchical_section_title caption_reference_description "  # noqa: SIM905
    "caption_attribution_description caption_alt_text_description mime_type original_height original_width "
    "is_main_image attribution_passes_lang_id page_changed_recently context_page_description "
    "context_section_description".split()
)
_SHORT = "caption_reference_description"
_LONG = (_SHORT, "page_title", "section_title", "context_page_description", "context_section_description")
_ROWS = 5000


@dataclass(frozen=True)
class Wit:
    """WIT: its TSV with a folder of images, or an img2dataset download that kept its columns

    The short caption is the reference description; the long one is caption, page title, section title, page
    description and section description, in this order. The TSV holds URLs only. Either fetch them with
    `img2dataset --input_format tsv --url_col image_url --caption_col caption_reference_description
    --save_additional_columns '["language", "page_title", "section_title", "context_page_description",
    "context_section_description"]'` and name the folder, or give the files by --images. img2dataset calls the column of
    --caption_col "caption" and cannot save it a second time: that is the reference description then.
    """

    image: ClassVar[ImageRule | None] = ImageRule()

    paths: tuple[str, ...] = argument("TSV files (also .gz) or folders of them; or one img2dataset folder")
    images: str = option("", "folder of the images, each named as the last part of its address")

    def pieces(self) -> Iterator[JsonObject]:
        if len(self.paths) == 1 and any(Path(self.paths[0]).glob("*_stats.json")):
            yield from shard_pieces(self.paths[0])
            return
        if not self.images:
            raise UserError("WIT's TSV holds addresses alone; name the folder of the images (--images)")
        for path in files_in(self.paths, (".tsv", ".tsv.gz")):
            table = open_table(path, Said("\t", "double", "none", "utf-8"))
            missing = [name for name in COLUMNS if name not in table.columns]
            if missing:
                raise UserError(
                    f"{path}: lacks WIT's columns {', '.join(missing)}; expected its TSV with the first line"
                )
            yield from table.pieces(_ROWS)

    def read(self, piece: JsonObject) -> Iterator[Found]:
        if "stats" in piece:
            for found in read_shard(piece):
                if not isinstance(found, tuple):
                    yield found
                    continue
                where, sample, fields = found
                short, long = _captions({**fields, _SHORT: fields.get(_SHORT) or fields.get("caption")})
                if short or long:
                    yield image_record(where, sample, fields, short=short, long=long)
                else:
                    yield Dropped("no caption", where)
        else:
            yield from from_rows(read_table(piece), self._record)

    def _record(self, where: str, values: JsonObject) -> Iterator[Found]:
        url = values.get("image_url") or ""
        try:
            name = unquote(urlsplit(url).path.rpartition("/")[2])
        except ValueError:  # "http://[": half an IPv6 address
            name = ""
        path = inside(Path(self.images), name) if name else None
        short, long = _captions(values)
        if path is None:
            yield Dropped("no image address", where)
        elif not short and not long:
            yield Dropped("no caption", where)
        else:
            yield ImageRecord(where, url, path, short, long)


def _captions(values: JsonObject) -> tuple[list[Text], list[Text]]:
    """Short and long caption of a row, each at most one."""
    language = values.get("language")
    language = language if isinstance(language, str) and language else "und"
    texts = {name: value.strip() for name in _LONG if isinstance(value := values.get(name), str) and value.strip()}
    short = [Text(texts[_SHORT], language, "name")] if _SHORT in texts else []
    parts = list(dict.fromkeys(texts.values()))  # the section's title is often the page's
    described = any(name in texts for name in _LONG[3:])  # titles alone are no long text
    return short, [Text("\n".join(parts), language, "long", "human:joined")] if described else []
