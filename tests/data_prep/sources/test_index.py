"""What `data-prep index` says of other people's tars."""

import io
import json
import tarfile

import pytest
from data_prep.cli import main
from data_prep.shards import Dataset
from PIL import Image


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_receipt_and_the_table_say_how_many_went_out(tmp_path, capsys, workers):
    """Samples, not members or shards: of three tars with 5, 1 and 0 of use."""
    for number, (good, bad) in enumerate([(5, 2), (1, 0), (0, 3)]):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for sample in range(good + bad):
                for ending, data in (("png", picture(sample)), *([("txt", b"a caption")] if sample < good else [])):
                    info = tarfile.TarInfo(f"{number}-{sample}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    tars = [str(tmp_path / f"{number}.tar") for number in range(3)]
    assert main(["index", *tars, "--out", str(tmp_path / "out"), "--workers", str(workers)]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["came", "in", "11"] in table
    assert ["image-short", "6"] in table
    folder = tmp_path / "out/image-short/indexed"
    receipt = json.loads((folder / "receipt.json").read_text())
    assert receipt["came_in"] == 11
    assert receipt["went_out"] == {"image-short": 6}
    assert sum(receipt["dropped"].values()) == 5
    dataset = Dataset.open(folder)
    assert (len(dataset), list(dataset.shard_sizes)) == (6, [5, 1])
