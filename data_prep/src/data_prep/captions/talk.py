"""Whether an answer talks to the user, or to itself, instead of describing the image.

It is told by what its sentences speak of, in thirty languages (`phrases.json`: each language has the same topics). A
sentence may describe an image that nobody attached only if it speaks of an image, of attaching, and says "not". What is
in quotation marks does not count: that is a sign in the picture. A phrase is looked for where a word begins, and is a
whole word if it ends in a space; anywhere after a "*", in languages that have no spaces, and in Arabic and Korean, whose words have
particles around them.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from pathlib import Path

from data_prep.captions.markup import without_quotations
from data_prep.shards.format import parse_json

_PHRASES = Path(__file__).parent / "phrases.json"
_INSIDE = {"zh", "ja", "ko", "th", "ar"}
_SENTENCE_END = re.compile(r"[.!?。！？؟।॥…۔;；;\n]+")
_WINDOW = 150  # characters of Thai, which does not mark the end of a sentence
_OPENING = 160  # characters
_MOST_LEAD = 8  # words before a colon
_ENDS = 3  # sentences at either end of an answer, where replies and offers are
_ALIKE = str.maketrans(
    {**dict.fromkeys([0x0640, 0x0670, *range(0x064B, 0x0660)]), **dict.fromkeys(map(ord, "أإآٱ"), "ا"), ord("İ"): "i"}
)
_APOSTROPHE = re.compile(r"(?<=[\u0400-\u04ff])['’ʼ](?=[\u0400-\u04ff])")  # a letter, nearly, in Ukrainian
_LABEL = re.compile(r"[\s*_#\"'“„«「【\[(]*([^:：\n]{1,60}?)[\s*_\"'”“»」】\])]*(?:[:：]|\n)")
_MOST_LABEL = 6  # words
_COLON = re.compile(r"([^:：.!?。！？\n]+)[:：]\s*+(?!“”)")
_LEAD = re.compile(r"[^\n]+[:：][\s*_]*\n\s*(?![-*•·\d“«„\"「『]|“”)")  # a line that leads to what follows, which is no list
_TITLE = re.compile(r"\s*[^\n]{1,60}\n\s*\n\s*\S")  # a short first line, and an empty one
_OUTCRY = re.compile(r"\W*([^.!?。！？\n]+)[!！]+(?![\"'”»」』])\s*(\w?).{40}", re.DOTALL)
_MOST_OUTCRY = 4  # words; letters by threes in languages without spaces
_QUESTION = re.compile(r"[?？؟]|(?:ます|です|ません|でしょう|ました)か(?:[。\s]|$)|(?:ได้|ดี|ด้วย)ไหม|ไหม(?:คะ|ครับ|$)|หรือยัง")
_MOST_REPLY = 4  # words; letters by threes in languages without spaces
_REPLY_END = re.compile(r"\W*?([!.。！:：\n–—-]+|[,，、])\s*(\w?)")
_PROMPT_RUN = 40  # letters in a row that an answer may share with its prompt; fewer where letters say more


def talk(text: str, language: str) -> str | None:
    """The reason why a text is talk: "refusal", "thoughts" or "chatter"; None if it describes."""
    spoken = without_quotations(unicodedata.normalize("NFC", text))
    for own in dict.fromkeys((language, "en")):
        said = _Said(spoken, own)
        if said.refuses():
            return "refusal"
        if said.thinks():
            return "thoughts"
        if said.chats():
            return "chatter"
    return None


def refuses(text: str, language: str) -> bool:
    """Whether a text refuses, or says that there is no image."""
    return talk(text, language) == "refusal"


def repeats(text: str, prompt: str, density: float) -> bool:
    """Whether a text has a long run of letters out of its prompt, quotations aside. density: see `judge`."""
    own, given = (words(without_quotations(one)).replace(" ", "") for one in (text, prompt))
    run = round(_PROMPT_RUN * density)
    return any(own[start : start + run] in given for start in range(len(own) - run + 1))


def words(text: str) -> str:
    """Letters, their marks and digits in lower case, one space for anything between them; Arabic without vowels."""
    text = _APOSTROPHE.sub("", unicodedata.normalize("NFC", text).translate(_ALIKE).casefold())
    return " ".join("".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split())


def phrases(language: str) -> dict[str, list[str]]:
    """Topic → its phrases in that language."""
    found: dict[str, list[str]] = parse_json(_PHRASES.read_bytes())[language]
    return found


@functools.cache
def topics(language: str) -> dict[str, re.Pattern[str]]:
    """Topic → what its phrases are found by, in sentences with a space before and behind."""
    inside = "" if language in _INSIDE else " "
    found = {}
    for topic, listed in phrases(language).items():
        spaced = [(" " if one[0] == " " else inside) + words(one) + (" " if one[-1] == " " else "") for one in listed]
        found[topic] = re.compile("|".join(map(re.escape, spaced)))
    return found


class _Said:
    """The sentences of a text without its quotations, and what they speak of."""

    def __init__(self, spoken: str, language: str) -> None:
        self.spoken, self.language, self.topics = spoken, language, topics(language)
        self.sentences = [f" {said} " for part in _SENTENCE_END.split(spoken) if (said := words(part))]
        if language == "th":
            whole = " ".join(self.sentences)
            self.sentences = [
                whole[start : start + _WINDOW] for start in range(0, max(1, len(whole) - _WINDOW // 2), _WINDOW // 2)
            ]
        self.head, self.tail = self.sentences[:_ENDS], self.sentences[-_ENDS:]

    def refuses(self) -> bool:
        """An apology where a sentence begins, what I cannot do, no image, or a request for it."""
        return (
            any(self.begins(sentence, "sorry") for sentence in self.head)
            or self.any_of("cannot")
            or any(self.has(one, "no", "image", "give") or self.has(one, "no", "image", "load") for one in self.head)
            or any(self.has(one, "no", "image", "message") for one in self.head)
            or any(self.any_of(*one) for one in (("please", "give"), ("please", "again"), ("address", "give", "image")))
        )

    def thinks(self) -> bool:
        """What the user wants, and what I must do for it."""
        asked = any(self.begins(one, "user") and self.has(one, "wants") for one in map(self.after_reply, self.head))
        return asked or self.any_of("thought")

    def chats(self) -> bool:
        """A reply before the description, an offer behind it, or somebody who says "I" or "you" about the describing."""
        return (
            self.replies()
            or self.labels()
            or self.asks()
            or any(self.has(one, "here", "describe") for one in self.sentences[:2])
            or self.any_of("first")
            or self.any_of("address", "describe")
            or any(self.has(one, "offer") for one in self.tail)
        )

    def asks(self) -> bool:
        """A question; captions have none. Greek writes a semicolon for it."""
        return bool(_QUESTION.search(self.spoken) or (self.language == "el" and re.search(r"[;\u037e]", self.spoken)))

    def replies(self) -> bool:
        """ "Sure!", "Of course, here is …": not "Sure-footed goats", nor a brand that is followed by its verb."""
        if (cry := _OUTCRY.match(self.spoken)) and not cry[2].islower():
            size = len(cry[1].split()) if self.language not in ("zh", "ja", "th") else len(cry[1]) / 3
            if size <= _MOST_OUTCRY:
                return True
        found = self.topics["sure"].match(self.sentences[0]) if self.sentences else None
        if not found:
            return False
        count = len(found[0].replace(" ", ""))
        place = next((n for n, _ in enumerate(self.spoken) if len(words(self.spoken[:n]).replace(" ", "")) >= count), 0)
        end = _REPLY_END.match(self.spoken, place)
        head = self.sentences[:2]
        said = self.sentences[0]
        if len(said.split()) <= _MOST_REPLY if self.language not in _INSIDE else len(said) <= 3 * _MOST_REPLY:
            return True
        if any(self.has(one, "here") or self.has(one, "describe") or self.has(one, "address") for one in head):
            return True
        if end is None:
            return False
        if end[1][0] in ",，、":
            return self.has(" " + " ".join(words(self.spoken[end.start(2) :])[:40].split()[:4]) + " ", "image")
        return not end[2].islower() and (end[1][0] not in "-–—" or self.spoken[end.start(1) - 1 : end.start(1)] == " ")

    def labels(self) -> bool:
        """ "Description:", "**Image caption**" in a line of its own, "The description is as follows:"."""
        leads = [one[1] for one in _COLON.finditer(self.spoken[:_OPENING]) if len(words(one[1]).split()) <= _MOST_LEAD]
        if _LEAD.match(self.spoken) or _TITLE.match(self.spoken) or any(self.has(f" {words(lead)} ", "describe") for lead in leads):
            return True
        found = _LABEL.match(self.spoken)
        label = f" {words(found[1])} " if found else ""
        at = [place.span() for place in self.topics["label"].finditer(label)]
        return len(label.split()) <= _MOST_LABEL and any(
            not label[:start].strip() or not label[end:].strip() for start, end in at
        )

    def after_reply(self, sentence: str) -> str:
        """A sentence without the "Okay, " before it."""
        found = self.topics["sure"].match(sentence)
        return " " + sentence[found.end() :].lstrip() if found else sentence

    def begins(self, sentence: str, topic: str) -> bool:
        return bool(self.topics[topic].match(sentence) or self.topics[topic].match(sentence.lstrip()))

    def any_of(self, *asked: str) -> bool:
        return any(self.has(sentence, *asked) for sentence in self.sentences)

    def has(self, sentence: str, *asked: str) -> bool:
        return all(self.topics[topic].search(sentence) for topic in asked)
