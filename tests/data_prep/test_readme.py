"""Every command of the README, as it stands there, on small inputs of the names that it uses."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import os
import re
import shlex
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from data_prep.cli import main
from datasets import Dataset
from pyarrow import parquet

from .captions.conftest import LANGUAGES, Reply, completion, good, seer  # noqa: F401 (a fixture)
from .curation.conftest import encoded, photo
from .execute.conftest import write_img2dataset
from .negatives.test_negatives import WORDS
from .sources.conftest import write_pdf

README = Path(__file__).parents[2] / "data_prep/README.md"
# What needs a network, or other machines; each is tested where it belongs.
ELSEWHERE = ("data-prep corpus data/laptop", "stage-trainer ")


def blocks(language: str, paper: bool = False) -> list[str]:
    """Blocks of code of the README; those of "The paper's data" apart, which test_paper_data.py runs."""
    text = README.read_text(encoding="utf-8")
    found = re.search(r"^## The paper's data$.*?(?=^## )", text, re.S | re.M)
    assert found
    return re.findall(rf"^```{language}\n(.*?)^```", found[0] if paper else text.replace(found[0], ""), re.S | re.M)


def commands_of(block: str) -> list[str]:
    return [line for line in block.splitlines() if line.startswith("data-prep ") and not line.startswith(ELSEWHERE)]


SEQUENCES = [found for block in blocks("bash") if (found := commands_of(block))]
TABLE = re.findall(r"\| `(data-prep .*?)` \|$", README.read_text(encoding="utf-8"), re.M)


def status_of(command: str) -> int:
    """Give a command, as a shell would."""
    parts = shlex.split(os.path.expandvars(command), comments=True)[1:]
    return main([word for part in parts for word in sorted(glob.glob(part)) or [part]])


def say(command: str) -> None:
    assert status_of(command) == 0, command


def save(path: str, data: bytes | str) -> None:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data.encode() if isinstance(data, str) else data)


def table(path: str, rows: list[dict]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.fixture
def here(tmp_path, monkeypatch, drawn):
    """A working folder with a tokenizer in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    Path("model").mkdir()
    shutil.copy(drawn / "tokenizer.model", "model/tokenizer.model")


def images_and_a_table() -> None:
    rows = [["file", "caption", "language"], *([f"{n}.jpg", f"photo, number {n}", "en"] for n in range(3))]
    for place in ("captions.csv", "photos/captions.csv"):
        Path("photos").mkdir(exist_ok=True)
        with open(place, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    for number in range(3):
        save(f"photos/{number}.jpg", encoded(photo(number), "JPEG"))


def pages_with_negatives() -> None:
    for number in (3, 7, 8):
        save(f"pages/{number}.png", encoded(photo(number), "PNG"))
    shown = re.search(r"^cat pages/pages.jsonl\n((?:# .*\n)+)", README.read_text(encoding="utf-8"), re.M)
    assert shown
    save("pages/pages.jsonl", shown[1].replace("# ", ""))


def texts() -> None:
    save("pairs/a.jsonl", '["Guten Tag.", "Good day."]\n')
    with gzip.open("pairs/b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"query": "one", "pos": ["eins"], "neg": list("abcdefg")}) + "\n")


def wit() -> None:
    columns = "language page_url image_url page_title section_title hierarchical_section_title"
    columns += " caption_reference_description caption_attribution_description caption_alt_text_description mime_type"
    columns += " original_height original_width is_main_image attribution_passes_lang_id page_changed_recently"
    columns += " context_page_description context_section_description"
    row = dict.fromkeys(columns.split(), "") | {"language": "iw", "image_url": "http://x/0.jpg", "page_title": "A page"}
    row["caption_reference_description"] = "A picture"
    for part in ("00000-of-00010", "00001-of-00010"):
        with gzip.open(f"wit_v1.train.all-{part}.tsv.gz", "wt", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([list(row), list(row.values())])
    save("wit-images/0.jpg", encoded(photo(0), "JPEG"))


def tars() -> None:
    write_img2dataset(Path("downloads"), 2, 11)
    Path("shards").mkdir()
    with tarfile.open("shards/00000000.tar", "w") as tar:
        uids = [f"{n:032x}" for n in range(3)]
        for number, uid in enumerate(uids):
            for extension, data in {
                "jpg": encoded(photo(number), "JPEG"),
                "txt": b"a caption",
                "json": json.dumps({"uid": uid, "caption": "a caption", "key": f"{number:09d}"}).encode(),
            }.items():
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    save("shards/00000000_stats.json", json.dumps({"count": 3, "successes": 3}))
    np.save("dfn.npy", np.array([(0, 0), (0, 2)], dtype="u8,u8"))
    Path("theirs").mkdir()
    shutil.copy("shards/00000000.tar", "theirs/a.tar")


def questions() -> None:
    image = encoded(photo(1), "PNG")
    save("docvqa/documents/a.png", image)
    row = {"questionId": 1, "question": "What?", "image": "documents/a.png", "docId": 1, "answers": ["That", "that"]}
    save("train_v1.0.json", json.dumps({"dataset_name": "x", "data": [row]}))
    save("images/1.jpeg", image)
    row = {"questionId": 1, "question": "What?", "image_local_name": "1.jpeg", "answers": ["That"]}
    save("infographicsVQA_train_v1.0.json", json.dumps({"data": [row]}))
    Path("train").mkdir()
    write_pdf(Path("train/ab12.pdf"), ["A page"])
    row = {"uid": "q", "question": "How much?", "answer": [3, 4.5], "scale": "million"}
    save("tatdqa_dataset_train.json", json.dumps([{"doc": {"uid": "ab12", "page": 1}, "questions": [row]}]))
    save("figures/f.png", image)
    row = {"image_file": "f.png", "id": "1", "caption": "A figure.", "q_a_pairs": [["What?", "That."]]}
    save("scigraphqa.json", json.dumps([row]))
    save("images/f.jpg", image)
    row = {"id": "1", "image": "images/f.jpg", "question": "What?", "options": ["A) x", "B) y"], "label": "B"}
    save("arxivqa.jsonl", json.dumps(row) + "\n")


def parquets() -> None:
    image = {"bytes": encoded(photo(2)), "path": "p.png"}
    table("colpali_train_set/data/train-0.parquet", [{"query": "What?", "image": image, "answer": "['That']"}])
    pairs = [{"sub_caption": "part a", "image": image}]
    table("arXiv_parquet/0.parquet", [{"caption_images": [{"caption": "Figure 1", "cil_pairs": pairs}]}])


def hugging_face() -> None:
    image = {"bytes": encoded(photo(2)), "path": None}
    Dataset.from_list([{"image": image, "caption": "a caption"}]).save_to_disk("saved")


def parallel() -> None:
    save("Books.de-en.de", "Guten Tag\n")
    save("Books.de-en.en", "Good day\n")
    unit = '<tu><tuv xml:lang="de"><seg>Tag</seg></tuv><tuv xml:lang="en"><seg>day</seg></tuv></tu>'
    save("de-en.tmx.gz", gzip.compress(f'<tmx version="1.4"><header srclang="de"/><body>{unit}</body></tmx>'.encode()))


def retrieval() -> None:
    save("nfcorpus/corpus.jsonl", json.dumps({"_id": "d", "title": "", "text": "water"}))
    save("nfcorpus/queries.jsonl", json.dumps({"_id": "q", "text": "What is ice?"}))
    save("nfcorpus/qrels/train.tsv", "query-id\tcorpus-id\tscore\nq\td\t1\n")


def mosaic() -> None:
    data = encoded(photo(5), "JPEG")
    sample = struct.pack("<II", 9, len(data)) + b"a caption" + data
    save("mds/shard.00000.mds", struct.pack("<III", 1, 12, 12 + len(sample)) + sample)
    raw = {"basename": "shard.00000.mds", "bytes": 12 + len(sample), "hashes": {}}
    shard = {"version": 2, "format": "mds", "compression": None, "samples": 1, "raw_data": raw, "zip_data": None}
    shard |= {"column_names": ["caption", "image"], "column_encodings": ["str", "jpeg"], "column_sizes": [None, None]}
    save("mds/index.json", json.dumps({"version": 2, "shards": [shard]}))


def captioned() -> None:
    image = encoded(photo(3), "JPEG")
    for name in ("data/coco/1.jpg", "coco/val2014/COCO_val2014_1.jpg"):
        save(name, image)
    turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": "A long story."}]
    row = {"id": "1", "image": "coco/1.jpg", "conversations": turns}
    save("share-captioner_coco_lcs_sam_1246k_1107.json", json.dumps([row]))
    row = {"filepath": "val2014", "filename": "COCO_val2014_1.jpg", "split": "restval", "cocoid": 1}
    row["sentences"] = [{"raw": f"Sentence {n}."} for n in range(5)]
    save("dataset_coco.json", json.dumps({"images": [row], "dataset": "coco"}))


def reports() -> None:
    Path("reports").mkdir()
    write_pdf(Path("reports/a.pdf"), ["Page one", "Page two"])


@pytest.mark.parametrize("command", TABLE)
def test_an_import_of_the_table_is_made_and_tells_edited_files(here, command, capsys):
    makers = (images_and_a_table, texts, wit, tars, questions, parquets, captioned, reports)
    for make in (*makers, hugging_face, parallel, retrieval, mosaic):
        make()
    files = [path for path in Path().rglob("*") if path.is_file()]
    say(command)
    for path in files:  # perhaps edited, to as many bytes
        os.utime(path, ns=(1, 1))
    assert status_of(command) == 2
    assert "the input is not the same" in capsys.readouterr().err


PUBLIC = re.findall(r"\| `(data-prep import [^`]*)` \| [^|`]* \|$", README.read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("command", PUBLIC)
def test_the_command_of_a_public_set_is_understood(command):
    """What it downloads cannot be had here; its options can be checked."""
    from data_prep.cli import _parser

    options = _parser().parse_args(shlex.split(command)[1:])
    assert options.source.__name__ in ("Hf", "Beir", "Moses")


def evaluation_sets() -> None:
    image = encoded(photo(4), "JPEG")
    for name in ("images/ab.jpg", "images/1.jpg", "coco/val2014/COCO_val2014_1.jpg", "val2014/COCO_val2014_1.jpg"):
        save(name, image)
    save("captions.jsonl", json.dumps({"image/key": "ab", "image/locale": "de", "de": {"caption": ["ein Bild"]}}))
    save("xtd10/test_image_names.txt", "COCO_val2014_1.jpg\n")
    save("xtd10/test_1kcaptions_de.txt", "ein Bild\n")
    save("flickr30k_test_karpathy.txt", "image,caption\n1.jpg,A man, a plan\n")
    content = {"images": [{"id": 1, "file_name": "COCO_val2014_1.jpg"}]}
    content["annotations"] = [{"id": n, "image_id": 1, "caption": f"caption {n}"} for n in range(5)]
    save("coco_test_karpathy.json", json.dumps(content))
    for part, row in {
        "corpus": {"corpus-id": 1, "image": {"bytes": image, "path": ""}},
        "queries": {"query-id": 1, "query": "which page"},
        "qrels": {"query-id": 1, "corpus-id": 1, "score": 1},
    }.items():
        table(f"arxivqa_test_subsampled_beir/{part}/0.parquet", [row])
    row = {"image_id": "ab", "image": {"bytes": image, "path": ""}, "captions": ["ein Bild"]}
    table("xm3600-mteb/data/de-00000-of-00001.parquet", [row])
    row = {"query": "which page", "image": {"bytes": image, "path": ""}, "image_filename": "1.jpg"}
    table("docvqa_test_subsampled/data/test-00000-of-00001.parquet", [row])
    save("wds_flickr30k/test/0.tar", "")
    with tarfile.open("wds_flickr30k/test/0.tar", "w") as tar:
        for name, data in (("0.jpg", image), ("0.txt", b"A man, a plan\nA canal")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    save("scifact/corpus.jsonl", json.dumps({"_id": "d", "title": "", "text": "a document"}))
    save("scifact/queries.jsonl", json.dumps({"_id": "q", "text": "a query"}))
    save("scifact/qrels/test.tsv", "query-id\tcorpus-id\tscore\nq\td\t1\n")
    save("sts12-sts/test.jsonl", json.dumps({"sentence1": "a", "sentence2": "b", "score": 2.5}))


def many_images(*sets: tuple[str, str]) -> None:
    """Data sets OUT/image-short/NAME of three other pictures each."""
    images_and_a_table()
    for place, (out, name) in enumerate(sets):
        for number in range(3):
            save(f"photos/{number}.jpg", encoded(photo(10 * place + number), "JPEG"))
        say(f"data-prep import images photos --name {name} --out {out} --workers 1")


def many_pairs() -> None:
    draw = np.random.default_rng(3)
    lines = []
    for _ in range(120):
        query = " ".join(draw.choice(WORDS, 8))
        lines.append(json.dumps([query, f"{query} {' '.join(draw.choice(WORDS, 3))}"]))
    save("questions.jsonl", "\n".join(lines))
    say("data-prep import texts questions.jsonl --language en --name questions --out data/train")


def in_three_languages(asked) -> Reply:
    """The service of the tests knows words of a few languages; in the others it will not answer."""
    if asked.language in LANGUAGES:
        return good(asked)
    return Reply(body=json.dumps(completion(None, refusal="I can't help with that.")).encode())


@pytest.mark.parametrize(
    "sequence",
    [
        pytest.param(one, id=one[0][:40], marks=[pytest.mark.full] * any("--engine ray" in line for line in one))
        for one in SEQUENCES
    ],
)
def test_commands_one_after_the_other(here, sequence, seer, monkeypatch, request):  # noqa: F811 (a fixture)
    monkeypatch.setenv("OPENAI_BASE_URL", seer.url)
    seer.behave = in_three_languages
    for word, make in (
        (" import images", lambda: (images_and_a_table(), texts(), reports(), pages_with_negatives())),
        (" import img2dataset", tars),
        (" split-long", lambda: many_images(("data/raw", "web"), ("eval/test", "photos"), ("data/train", "photos"))),
        (" negatives", many_pairs),
        (" captions", lambda: many_images(("data/train", "web"))),
        (" evalset", evaluation_sets),
    ):
        if word in sequence[0]:
            make()
    if any("runs/model" in command for command in sequence):
        Path("runs").mkdir()
        Path("runs/model").symlink_to(request.getfixturevalue("dual_encoder")[0])
    for command in sequence:
        if "--engine ray" in command or "--task" in command:
            shutil.rmtree("data")  # the same data set in another way
        say(command)


def test_the_python_of_the_readme(here, capsys):
    for block in blocks("python"):
        exec(block, {})
    assert capsys.readouterr().out
