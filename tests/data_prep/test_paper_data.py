"""Every command of the README's "The paper's data", in order, on small inputs of the names that it uses: what comes out
is what the paper's recipe names."""

from __future__ import annotations

import copy
import csv
import glob
import gzip
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_prep.shards import Dataset
from data_prep.sources.wit import COLUMNS
from stage_trainer.data.remote_data import place
from stage_trainer.recipe.read import load
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from .captions.conftest import WORDS as OF_LANGUAGE
from .captions.conftest import seer  # noqa: F401 (a fixture)
from .curation.conftest import encoded, photo
from .test_readme import blocks, in_three_languages, parquets, questions, save, say, table

ROOT = Path(__file__).parents[2]
COMMANDS = [
    line for block in blocks("bash", paper=True) for line in block.splitlines() if line.startswith("data-prep ")
]


def sentences(language: str, count: int, words: int = 9) -> list[str]:
    draw, vocabulary = np.random.default_rng(len(language) + words), OF_LANGUAGE[language].split()
    return [" ".join(draw.choice(vocabulary, words)) for _ in range(count)]


def commonpool() -> None:
    """Four images: English and German, each with a short caption and one of more than 256 tokens."""
    captions = [sentences(language, 1, words)[0] for language in ("en", "de") for words in (30, 300)]
    Path("commonpool/shards").mkdir(parents=True)
    with tarfile.open("commonpool/shards/00000000.tar", "w") as tar:
        for number, text in enumerate(captions):
            fields = {"uid": f"{number:032x}", "caption": text, "key": f"{number:09d}"}
            image = encoded(photo(number), "JPEG")
            for extension, data in {"jpg": image, "txt": text.encode(), "json": json.dumps(fields).encode()}.items():
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    save("commonpool/shards/00000000_stats.json", json.dumps({"count": 4, "successes": 4}))
    np.save("dfn_2b_inds.npy", np.array([(0, 0), (0, 1)], dtype="u8,u8"))


def wit() -> None:
    row = dict.fromkeys(COLUMNS, "") | {"language": "de", "image_url": "http://x/0.jpg", "page_title": "Ein Haus"}
    row |= {"caption_reference_description": "Ein Bild", "context_page_description": "Ein Haus steht am Fluss."}
    with gzip.open("wit_v1.train.all-00000-of-00010.tsv.gz", "wt", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([list(row), list(row.values())])
    save("wit-images/0.jpg", encoded(photo(0), "JPEG"))


def pools() -> None:
    save("flickr30k_test_karpathy.txt", "image,caption\n1.jpg,A man, a plan\n")
    save("flickr30k-images/1.jpg", encoded(photo(5), "JPEG"))
    save(
        "xm3600/captions.jsonl", json.dumps({"image/key": "ab", "image/locale": "de", "de": {"caption": ["Ein Bild"]}})
    )
    save("xm3600/images/ab.jpg", encoded(photo(6), "JPEG"))


def texts() -> None:
    """Pairs that share numbers, which is what the towers of the tests tell answers by."""
    pairs_of_digits = [f"{a}{b}" for a in range(10) for b in range(10) if a != b][:60]
    numbers = [" ".join([digits * 5] * 2) for digits in pairs_of_digits]
    queries = [f"{text} {number}" for text, number in zip(sentences("en", 60), numbers, strict=True)]
    pairs = [
        [query, f"{text} {number}"]
        for query, text, number in zip(queries, sentences("en", 60, 4), numbers, strict=True)
    ]
    for name in ("PAQ_pairs", "S2ORC_title_abstract", "gooaq_pairs", "NQ-train_pairs"):
        lines(name, pairs)
    lines("AllNLI", [[*pair, "no"] for pair in pairs])
    lines("msmarco-triplets", [{"query": a, "pos": [b], "neg": list("abcdefgh")} for a, b in pairs])
    for language in ("de", "fr"):
        answers = [f"{text} {number}" for text, number in zip(sentences(language, 60, 12), numbers, strict=True)]
        rows = [{"english": a, "non_english": b} for a, b in zip(queries, answers, strict=True)]
        table(f"wikimatrix/en-{language}/train-0.parquet", rows)


def lines(name: str, values) -> None:
    with gzip.open(f"{name}.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)


def tokenizer(path: Path) -> None:
    """Words and the two marks, in the form that the Hub keeps tokenizers in."""
    made = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, "</s>": 2}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(str(path))


def bag_of_pieces(tower, path: Path) -> None:
    """A tower whose similarities are shares of common pieces: tables at random, blocks that add nothing."""
    tower = copy.deepcopy(tower)
    for name, parameter in tower.named_parameters():
        if "embeddings" in name:
            torch.nn.init.normal_(parameter, std=float("word" in name))
        elif parameter.dim() == 2:
            torch.nn.init.zeros_(parameter)
    tower.save_pretrained(path)


@pytest.fixture
def here(tmp_path, monkeypatch, dual_encoder, seer):  # noqa: F811 (a fixture)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", seer.url)
    seer.behave = in_three_languages
    for make in (commonpool, wit, pools, texts, questions, parquets):
        make()
    tokenizer(Path("runs/jina-clip-v2-data/tokenizer.json"))
    bag_of_pieces(dual_encoder[1].text, Path("jina-embeddings-v3"))
    Path("clip").symlink_to(dual_encoder[0])


def test_the_commands_make_what_the_recipe_names(here):
    for command in COMMANDS:
        # The multilingual CLIP of the README is a download; a model of ours scores here.
        command = command.replace("open_clip:xlm-roberta-base-ViT-B-32:laion5b_s13b_b90k", "clip").replace("0.3", "1.0")
        say(command if " captions " in command else f"{command} --workers 1")
    recipe = load(ROOT / "launch/recipes/jina-clip-v2.yaml").recipe
    assert Path(recipe.model.tokenizer).is_file()
    named = set()
    for stage in recipe.stages:
        tasks = {"image_text": {"image-short", "image-long"}, "text": {"text-pairs", "text-triplets"}}
        for task, kinds in tasks.items():
            for source in getattr(stage.data, task):
                dataset = Dataset.open(place(recipe, "train", source.path), verify=True)
                assert dataset.kind in kinds
                assert dataset.kind == source.path.partition("/")[0]
                assert len(dataset)
                named.add(place(recipe, "train", source.path))
    for path in recipe.evaluation.pools:
        assert len(Dataset.open(place(recipe, "validation", path), verify=True))
    made = {Path(path).parent for path in glob.glob(f"{recipe.corpus}/train/*/*/manifest.json")}
    # Made on the way, or besides: a short caption of SciGraphQA's figures.
    assert made - named <= {Path(recipe.corpus) / "train/image-short/scigraphqa"}
    shutil.rmtree(recipe.corpus)


def test_section_3_1_is_in_the_recipe_whole():
    """The sets that the paper names for short and for long captions, typed from its section 3.1."""
    both = {"dfn", "commonpool", "docvqa", "tatdqa", "infographicsvqa", "scigraphqa", "arxivqa", "arxivcap", "wit"}
    both |= {"vidore"}
    recipe = load(ROOT / "launch/recipes/jina-clip-v2.yaml").recipe
    sets = [{source.path.partition("/")[2] for source in stage.data.image_text} for stage in recipe.stages]
    assert sets == [both, both | {"synthetic"}, both | {"synthetic"}]
    of_web = [
        {source.path for source in stage.data.image_text if source.path.endswith(("dfn", "commonpool", "wit"))}
        for stage in recipe.stages
    ]
    assert [{path.partition("/")[0] for path in paths} for paths in of_web] == [
        {"image-short"}, {"image-long"}, {"image-long"}
    ]  # fmt: skip
    kinds = [{source.path.partition("/")[0] for source in stage.data.text} for stage in recipe.stages]
    assert kinds == [{"text-pairs"}, {"text-pairs"}, {"text-triplets"}]
