"""Whether an answer talks to the user, or to itself, instead of describing the image.

It is told by what its sentences speak of (`topics.py`), and by its form (`layout.py`). A sentence is about an image
that nobody attached only if it speaks of an image, of attaching, and says "not". What is in quotation marks does not
count: that is a sign in the picture.
"""

from __future__ import annotations

import re
import unicodedata

from data_prep.captions.layout import asks, cries, labelled, leads, titled
from data_prep.captions.markup import without_quotations
from data_prep.captions.topics import Sentences, words

_ENDS = 3  # sentences at either end of an answer, where replies and offers are
_LABEL = re.compile(r"[\s*_#\"'“„«「【\[(]*([^:：\n]{1,60}?)[\s*_\"'”“»」】\])]*(?:[:：]|\n)")
_MOST_LABEL = 6  # words
_MOST_BEFORE = 2  # words before "the user", as in "Okay, the user wants"; letters by threes without spaces
_MOST_REPLY = 4  # words; letters by threes in languages without spaces
_REPLY_END = re.compile(r"\W*?([!.。！:：\n–—-]+|[,，、])\s*(\w?)")
_PROMPT_RUN = 40  # letters in a row that an answer may share with its prompt; fewer where letters say more


def talk(text: str, language: str) -> str | None:
    """The reason why a text is talk: "refusal", "thoughts" or "chatter"; None if it describes."""
    spoken = without_quotations(unicodedata.normalize("NFC", text))
    for own in dict.fromkeys((language, "en")):
        said = Sentences(spoken, own)
        if _refuses(said):
            return "refusal"
        if _thinks(said):
            return "thoughts"
        if _chats(said) or _replies(said, spoken) or _labels(said, spoken):
            return "chatter"
    return "chatter" if asks(spoken, language) or titled(spoken) or labelled(spoken) else None


def refuses(text: str, language: str) -> bool:
    """Whether a text refuses, or says that there is no image."""
    return talk(text, language) == "refusal"


def repeats(text: str, prompt: str, density: float) -> bool:
    """Whether a text has a long run of letters out of its prompt, quotations aside. density: see `judge`.

    Marks around the whole are none of a quotation: a prompt that has one inside would hide behind them.
    """
    bare = text.strip().strip("\"'“”„«»‹›「」『』《》‘’")
    own, given = (words(without_quotations(one)).replace(" ", "") for one in (bare, prompt))
    run = round(_PROMPT_RUN * density)
    return any(own[start : start + run] in given for start in range(len(own) - run + 1))


def _refuses(said: Sentences) -> bool:
    """An apology where a sentence begins, what I cannot do, no image, or a request for it."""
    missing = (("no", "image", "give"), ("no", "image", "load"), ("no", "image", "message"))
    wanted = (("please", "give"), ("please", "again"), ("address", "give", "image"))
    head = said.all[:_ENDS]
    return (
        any(said.begins(sentence, "sorry") for sentence in head)
        or said.any_of("cannot")
        or any(said.has(sentence, *one) for sentence in head for one in missing)
        or any(said.has(sentence, *one) and not said.has(sentence, "here") for sentence in said.all for one in wanted)
    )


def _thinks(said: Sentences) -> bool:
    """What the user wants, or what I must do for it."""
    for sentence in said.all[:_ENDS]:
        named = said.places(sentence, "user")
        before = sentence[: named[0][0]] if named else ""
        few = len(before.split()) <= _MOST_BEFORE if said.spaced else len(before) <= 3 * _MOST_BEFORE
        if named and few and said.has(sentence, "wants"):
            return True
    return any(said.has(sentence, "thought") and not said.has(sentence, "offer") for sentence in said.all)


def _chats(said: Sentences) -> bool:
    """Here is a description; I, or you and the description; an offer behind it; "If …", "Thank …" at the end."""
    return (
        any(said.has(one, "here", what) for one in said.all[:2] for what in ("describe", "address"))
        or said.any_of("first")
        or said.any_of("address", "describe")
        or any(said.has(sentence, "offer") for sentence in said.all[-_ENDS:])
        or any(said.begins(sentence, "closing") for sentence in said.all[1:][-1:])
    )


def _replies(said: Sentences, spoken: str) -> bool:
    """ "Sure!", "Of course, here is …": not "Sure-footed goats", nor a brand that is followed by its verb."""
    if cries(spoken, said.spaced):
        return True
    reply = said.begins(said.all[0], "sure") if said.all else None
    if reply is None:
        return False
    if (len(said.all[0].split()) if said.spaced else len(said.all[0]) / 3) <= _MOST_REPLY:
        return True
    if any(said.has(sentence, topic) for sentence in said.all[:2] for topic in ("here", "describe", "address")):
        return True
    end = _REPLY_END.match(spoken, _behind(spoken, len(reply.replace(" ", ""))))
    if end is None:
        return False
    if end[1][0] in ",，、":
        return said.has(" " + " ".join(words(spoken[end.start(2) :][:40]).split()[:4]) + " ", "image")
    return not end[2].islower() and (end[1][0] not in "-–—" or spoken[end.start(1) - 1 : end.start(1)] == " ")


def _behind(text: str, letters: int) -> int:
    """The place in a text behind so many letters and digits."""
    return next(
        (place for place in range(len(text)) if len(words(text[:place]).replace(" ", "")) >= letters), len(text)
    )


def _labels(said: Sentences, spoken: str) -> bool:
    """ "Description:", "**Image caption**" in a line of its own, "The description is as follows:"."""
    if any(said.has(f" {words(lead)} ", "describe") for lead in leads(spoken)):
        return True
    found = _LABEL.match(spoken)
    label = f" {words(found[1])} " if found else ""
    return len(label.split()) <= _MOST_LABEL and any(
        not label[:start].strip() or not label[end:].strip() for start, end in said.places(label, "label")
    )
