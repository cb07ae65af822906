"""Each kind of answer that is no caption: its reason, through a run; what is cut off, and what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_prep.captions.judge import judge
from data_prep.captions.ledger import RequestLedger
from data_prep.captions.markup import without_quotations, without_thoughts
from data_prep.captions.talk import talk
from data_prep.captions.texts import read_prompt
from data_prep.captions.topics import phrases
from data_prep.cli import main
from data_prep.languages import LANGUAGES
from data_prep.shards import Dataset

from .conftest import Reply, caption, completion, states

CAPTIONS = json.loads((Path(__file__).parent / "answers/seen_1.json").read_text(encoding="utf-8"))
PROSE = CAPTIONS["en"]["caption"]


def verdict(content: object, finish: object = "stop", language: str = "en"):
    return judge(json.dumps(completion(content, finish=finish)).encode(), language)


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("thoughts", "<think>What do I see? {}"),
        ("thoughts", "{} <think>Was that all?</think>"),
        ("thoughts", "The user wants a long description. {}"),
        ("markup", "{}<|im_end|>\n<|im_start|>user\nThank you!<|im_end|>"),
        ("markup", "Assistant: {}"),
        ("prompt", "Say what can be seen: people, animals and things, what they look like, how many there are. {}"),
        (
            "chatter",
            "Sure! Here is a detailed description of the image you uploaded, in English:\n\n**Description:** {}",
        ),
        ("chatter", "{}\n\nLet me know if you would like me to adjust the tone!"),
        ("refusal", "It seems that no image was attached to your message. {}"),
    ],
)
def test_what_is_no_caption_is_named_listed_and_asked_again_if_the_user_says_so(
    seer, planned, run, ledger, capsys, reason, text
):
    planned(2, languages=["en"])
    seer.behave = lambda asked: Reply(
        body=json.dumps(completion(text.replace("{}", caption("en", asked.image)))).encode()
    )
    assert run() == 0
    assert f"`data-prep captions status {ledger}` lists what was rejected" in capsys.readouterr().out
    assert states(ledger) == {f"rejected:{reason}": 2}
    assert main(["captions", "status", ledger]) == 0
    said = capsys.readouterr().out
    assert f"rejected, {reason}: 2; `captions run --resend {reason}` asks again" in said
    ids = [row["id"] for row in RequestLedger(ledger).db.execute("SELECT id FROM request").fetchall()]
    assert all(f"  {one}  en\n" in said for one in ids)
    seer.behave = lambda asked: Reply(body=json.dumps(completion(caption("en", asked.image))).encode())
    assert run("--resend", reason) == 0
    assert states(ledger) == {"accepted": 2}


@pytest.mark.parametrize(
    ("reason", "texts"),
    [
        (
            "chatter",
            ["Here you go: {}", "Translation: {}", "English: {}", "[Description] {}", "{} [end of description]",
             "{}\n\nTags: bookshop, ladder", "{} Confidence: 0.9", "{}\n\nLanguage: English", "{}\nSource: the image",
             "The image you shared shows the following. {}"],
        ),
        (
            "markup",
            ["1. {}", "- {}", "> {}", "<img src='x'>{}", "{} &nbsp;", "{}\n\n---\nGenerated", "{}\n#bookshop #cozy"],
        ),
        ("refusal", ["Sorry for the confusion earlier. {}"]),
    ],
)  # fmt: skip
def test_labels_lists_and_tags_around_a_caption_make_it_none(reason, texts):
    assert {text: verdict(text.replace("{}", PROSE)).reason for text in texts} == dict.fromkeys(texts, reason)


@pytest.mark.parametrize(
    "text",
    [
        "{} A sign says: “Exit 7”.", "{} The label reads \"Note: fragile\".", "{} Number #7 leads the race.",
        "“Menu: soup”, says a board. {}", "{} On a board stand three things:\n- milk\n- bread\n- salt",
    ],
)  # fmt: skip
def test_signs_and_lists_in_the_picture_are_no_labels(text):
    assert verdict(text.replace("{}", PROSE)).reason is None


@pytest.mark.parametrize("finish", ["abort", "error", "tool_calls", "eos", "", None, 5])
def test_only_stop_is_the_end_of_a_caption(finish):
    assert verdict(PROSE, finish).reason == "unfinished"


@pytest.mark.parametrize(
    ("finish", "reason"),
    [("length", "truncated"), ("MAX_TOKENS", "truncated"), ("content_filter", "refusal"), ("SAFETY", "refusal"),
     ("STOP", None)],
)  # fmt: skip
def test_other_names_of_the_same_end_are_known(finish, reason):
    assert verdict(PROSE, finish).reason == reason


def test_a_missing_finish_reason_is_no_stop():
    answer = completion(PROSE)
    del answer["choices"][0]["finish_reason"]
    assert judge(json.dumps(answer).encode(), "en").reason == "unfinished"


@pytest.mark.parametrize(
    ("content", "text", "reason"),
    [
        ([{"type": "text", "text": PROSE}], PROSE, None),
        ([{"type": "output_text", "text": PROSE[:100]}, PROSE[100:]], PROSE, None),
        ([{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": PROSE}], PROSE, None),
        ([{"type": "refusal", "refusal": "No."}], None, "refusal"),
        ([], None, "empty"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], None, "malformed"),
        ([{"type": "text", "text": None}], None, "malformed"),
        ([{"type": "text", "text": "half a character \ud800"}], None, "malformed"),
        ([5], None, "malformed"),
        ({"type": "text", "text": PROSE}, None, "malformed"),
    ],
)  # fmt: skip
def test_a_list_of_parts_is_read_as_the_text_in_it(content, text, reason):
    found = verdict(content)
    assert (found.caption, found.reason) == (text, reason)


@pytest.mark.parametrize(
    "thoughts",
    [
        "<think>\nOkay, boats.\n</think>\n\n",
        "Okay, boats.\n</think>\n\n",
        "<think></think>",
        "<thinking>Boats, <b>two</b>.</thinking>",
        "[THINK]Boats.[/THINK]",
        "◁think▷Boats.◁/think▷",
        "<|begin_of_thought|>Boats.<|end_of_thought|>\n",
        "<|channel|>analysis<|message|>Boats.<|end|><|start|>assistant<|channel|>final<|message|>",
        "analysisBoats.assistantfinal",
    ],
)
def test_thoughts_before_a_caption_are_cut_off_and_nothing_else(thoughts):
    assert verdict(thoughts + PROSE).caption == PROSE
    assert without_thoughts(thoughts + PROSE).strip() == PROSE


@pytest.mark.parametrize("text", ["{}</think>", "{} <think>More.</think> {}", "<think>{}", "a <think>b</think> {}"])
def test_a_caption_is_never_taken_for_thoughts_and_cut_off(text):
    assert verdict(text.replace("{}", PROSE)).reason == "thoughts"


def test_what_is_quoted_is_said_by_the_picture():
    assert without_quotations('A sign says "Sorry, closed!" and „Ja“ and «oui» and 「はい」.').count("“”") == 4
    assert without_quotations("It's the dogs' bowl, isn't it") == "It's the dogs' bowl, isn't it"
    long = f'"{PROSE}"'
    assert without_quotations(long) == long  # as a whole: no quotation
    assert talk(f'"Sure! Here is the description. {PROSE}"', "en") == "chatter"


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_prompt_of_the_users_own_that_comes_back_is_no_caption(language):
    own = CAPTIONS[language]["caption"]
    prose = f"{own} {own[:20]}"
    raw = json.dumps(completion(prose)).encode()
    assert judge(raw, language, prompts=[read_prompt("v1", language).text]).reason is None
    assert judge(raw, language, prompts=["…", f"Write: {own[:150]}"]).reason == "prompt"


def test_each_language_has_every_topic_and_none_is_empty():
    topics = list(phrases("en"))
    for language in LANGUAGES:
        assert list(phrases(language)) == topics
        assert all(found and all(one.strip(" *") for one in found) for found in phrases(language).values())


def test_what_is_exported_after_thoughts_is_the_caption_alone(seer, planned, run, ledger, tmp_path):
    planned(1, languages=["en"])

    def behave(asked):
        thoughts = "<think>\nOkay, the user wants a long description. I see a harbour.\n</think>\n\n"
        return Reply(
            body=json.dumps(completion([{"type": "text", "text": thoughts + caption("en", asked.image)}])).encode()
        )

    seer.behave = behave
    assert run() == 0
    assert main(["captions", "export", ledger, str(tmp_path / "long")]) == 0
    (text,) = json.loads(Dataset.open(tmp_path / "long").read(0)["json"])["captions"]
    assert text["text"] == caption("en", seer.asked[0].image)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("marks", ['""', "“”", "«»", "「」"])
def test_a_prompt_in_quotation_marks_is_no_sign_in_the_picture(language, marks):
    prompt = read_prompt("v1", language).text
    raw = json.dumps(completion(f"{marks[0]}{prompt}{marks[1]}")).encode()
    assert judge(raw, language, prompts=[prompt]).reason in ("prompt", "chatter", "refusal")


@pytest.mark.parametrize("left", ["final\n{}", "<ctrl94>thought\nA boat.<ctrl95>{}", "/no_think {}", "{} /think"])
def test_what_reasoning_models_leave_around_a_caption_is_markup(left):
    assert verdict(left.replace("{}", PROSE)).reason == "markup"
    assert verdict(PROSE + " A sign points to the final/think tank.").reason is None


def test_an_answer_of_megabytes_is_too_long_before_anything_else_is_asked(monkeypatch):
    monkeypatch.setattr("data_prep.captions.judge.has_markup", lambda text: pytest.fail("it takes minutes"))
    assert verdict("word " * 1_000_000).reason == "length"
