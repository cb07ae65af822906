"""Sets of questions: query and answer as one caption, answers of every type, questions of one image together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_prep.errors import UserError
from data_prep.sources.answers import answer_text, chosen, listed


@pytest.fixture
def images(tmp_path, picture) -> Path:
    (tmp_path / "documents").mkdir()
    for number in range(3):
        (tmp_path / f"documents/{number}.png").write_bytes(picture(number, encoding="PNG"))
    return tmp_path


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (" ITC ", "ITC"),
        (["a", "b"], "a, b"),
        (120, "120"),
        (12.0, "12"),
        (0.5, "0.5"),
        (["x", 3], "x, 3"),
        (None, ""),
        ([], ""),
        (True, ""),
        ({"a": 1}, ""),
    ],
)
def test_an_answer_is_a_string_a_number_or_a_list(answer, text):
    assert answer_text(answer) == text


@pytest.mark.parametrize(
    ("label", "options", "text"),
    [
        ("B", ["A) one", "B) two"], "two"),
        ("(b)", ["one", "two"], "two"),
        ("A) one", ["A) one", "B) two"], "one"),
        ("B.", ["A. one", "B. two"], "two"),
        ("E", ["A) one"], "E"),
        ("yes", ["A) one"], "yes"),
        ("B", None, "B"),
        ("B", ["A", "B"], "B"),
    ],
)
def test_a_letter_stands_for_its_option(label, options, text):
    assert chosen(label, options) == text


def test_a_list_stored_as_text_is_read_without_running_it():
    assert listed("['A', 'B']") == ["A", "B"]
    assert listed("[__import__('os').getcwd()]") == "[__import__('os').getcwd()]"
    assert listed("plain") == "plain"


def question(number: int, **fields: object) -> dict:
    return {
        "questionId": number,
        "question": f"What {number}?",
        "question_types": ["form"],
        "docId": 1,
        "image": "documents/0.png",
        "ucsf_document_id": "x",
        "ucsf_document_page_no": "1",
        "answers": [f"answer {number}", "other spelling"],
        "data_split": "train",
        **fields,
    }


def test_docvqa_puts_the_questions_of_a_page_together(images, run):
    data = [
        question(1),
        question(2),
        question(3, image="documents/1.png"),
        question(4),
        question(5, answers=[]),
        question(6, image="../x.png"),
        question(7, question=None),
        "odd",
        {key: value for key, value in question(8).items() if key not in ("answers", "image")},
    ]
    path = write(images / "train_v1.0.json", {"dataset_name": "docvqa", "dataset_split": "train", "data": data})
    found = run("docvqa", questions=path, images=images)
    assert [(sample.captions, sample.content["item"]) for sample in found.samples["image-long"]] == [
        (["What 1? answer 1", "What 2? answer 2"], "docvqa/documents/0.png"),
        (["What 3? answer 3"], "docvqa/documents/1.png"),
        (["What 4? answer 4"], "docvqa/documents/0.png"),  # apart from the others, and the same item
    ]
    assert found.dropped == {
        "file name outside the folder": 1,
        "no answer": 2,
        "no question": 1,
        "not a JSON object": 1,
    }


def test_infographics_are_named_by_another_field(images, run):
    data = [
        {
            "questionId": 1,
            "question": "How many?",
            "image_local_name": "documents/2.png",
            "image_url": "https://x",
            "ocr_output_file": "x.json",
            "answers": ["3", "three"],
            "data_split": "train",
        }
    ]
    found = run("infographicsvqa", questions=write(images / "i.json", {"data": data}), images=images)
    assert found.samples["image-long"][0].captions == ["How many? 3"]


def test_arxivqa_answers_with_the_option(images, run, monkeypatch):
    rows = [
        {
            "id": "physics-1",
            "image": "documents/0.png",
            "question": "Which?",
            "options": ["A) red", "B) blue"],
            "label": "B",
            "rationale": "…",
        },
        {
            "id": "physics-2",
            "image": "documents/0.png",
            "question": "Why?",
            "options": ["- A) so", "- B) thus"],
            "label": "B) thus",
            "rationale": "",
        },
        {"id": "physics-3", "image": "documents/1.png", "question": "Q", "options": [], "label": None, "rationale": ""},
    ]
    path = images / "arxivqa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "[3]\n")
    monkeypatch.chdir(images)
    found = run("arxivqa", questions="arxivqa.jsonl", images=".")  # as the README has it
    (sample,) = found.samples["image-long"]
    assert sample.captions[0] == "Which? blue"
    assert sample.content["captions"][0]["origin"] == "synthetic:gpt-4v"
    assert found.dropped == {"no answer": 1, "not a JSON object": 1}


@pytest.mark.parametrize("name", ["graph.json", "graph.jsonl"])
def test_scigraphqa_gives_the_figures_caption_and_its_dialogue(images, run, name):
    row = {
        "image_file": "documents/0.png",
        "id": "1809.00010v1-Figure2-1",
        "caption": "Figure 2: a curve",
        "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A curve."}],
        "first_mention": "see",
        "response": "…",
        "title": "t",
        "abstract": "a",
        "q_a_pairs": [["What?", "A curve."], ["Why?", ""], ["odd"], ["What?", "A curve."]],
    }
    path = images / name
    rows = [row, {**row, "image_file": None}]
    path.write_text(json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(r) + "\n" for r in rows))
    found = run("scigraphqa", questions=path, images=images)
    assert found.samples["image-short"][0].captions == ["Figure 2: a curve"]
    assert found.samples["image-long"][0].captions == ["What? A curve."]
    assert found.dropped == {"no image name, or one outside the folder": 1}


def test_a_list_is_found_by_its_key_wherever_brackets_stand(images, run, monkeypatch):
    import data_prep.sources.questions as module

    monkeypatch.setattr(module, "_ELEMENTS", 2)
    tricky = {"note": 'data": [ { \\" ]', "info": {"data": [1, 2]}, "more": [[{"data": []}]]}
    data = [question(number, question=f'"[{{ {number} ]\\', image=f"documents/{number % 3}.png") for number in range(5)]
    found = run("docvqa", questions=write(images / "q.json", {**tricky, "data": data, "end": [1]}), images=images)
    assert found.receipt["job"]["units"] == 3
    assert [sample.captions for sample in found.samples["image-long"]] == [
        [f'"[{{ {number} ]\\ answer {number}'] for number in range(5)
    ]


def test_a_json_file_that_is_cut_or_another_is_refused(images, run):
    path = write(images / "q.json", {"data": [question(number) for number in range(9)]})
    path.write_text(path.read_text()[:-40])
    with pytest.raises(UserError, match="q.json: is cut short, or holds no list under 'data'"):
        run("docvqa", questions=path, images=images)
    with pytest.raises(UserError, match="holds no list under 'data'"):
        run("docvqa", questions=write(images / "other.json", {"rows": []}), images=images)


def test_a_string_without_an_end_is_read_once(images, run):
    """As a string it is no match; each of its quotes was then tried again, in quadratic time."""
    path = images / "q.json"
    path.write_bytes(b'{"data": [{"question": "' + rb"\"" * 2_000_000)
    with pytest.raises(UserError, match="q.json: is cut short"):
        run("docvqa", questions=path, images=images)


def test_one_broken_element_of_a_list_costs_itself_alone(images, run):
    data = [question(number, image=f"documents/{number % 3}.png") for number in range(9)]
    raw = json.dumps({"data": data}).encode()
    raw = raw.replace(b"What 3?", b"What \xe9?").replace(b'"What 5?"', b'"What 5?" oops').replace(b"What 6?", b"a\tb")
    (images / "q.json").write_bytes(raw)
    found = run("docvqa", questions=images / "q.json", images=images)
    assert found.dropped == {"not JSON": 2, "not UTF-8": 1}
    assert found.receipt["examples"]["not UTF-8"] == ["q.json, element 3"]
    assert [text for sample in found.samples["image-long"] for text in sample.captions] == [
        f"What {number}? answer {number}" for number in (0, 1, 2, 4, 7, 8)
    ]
