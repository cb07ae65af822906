"""Parts of an answer that are meant for a program: thoughts between tags, tokens of a chat template, tags, JSON."""

from __future__ import annotations

import re

_THINK = r"(?:\w+:)?(?:think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad|inner_monologue|observation)"
# <think> and its siblings: [THINK] of Mistral, ◁think▷ of Kimi, <|begin_of_thought|>, the channels of gpt-oss (whose
# tokens some servers leave out: "analysisWe need to … assistantfinal").
_OPEN = re.compile(
    rf"<{_THINK}>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|think\|>"
    r"|(?:<\|start\|>assistant)?<\|channel\|>(?:analysis|commentary)<\|message\|>|^\s*analysis(?=[A-Z])",
    re.IGNORECASE,
)
_CLOSE = re.compile(
    rf"</{_THINK}>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>(?:\s*<\|begin_of_solution\|>)?|<\|/think\|>"
    r"|<\|channel\|>final<\|message\|>|assistantfinal",
    re.IGNORECASE,
)
# Tokenizers read these as special tokens wherever they stand; so they are faults even in a quotation.
_TOKENS = re.compile(
    r"<[|｜][^<>|｜\n]{1,40}[|｜]>|</?s>|<(?:bos|eos|pad|unk|mask|image|img|video|audio|image_soft_token)\d*>"
    r"|<(?:ctrl|unused|extra_id_|special_token_)\d+>|(?<!\S)/(?:no_?)?think(?!\S)"
    r"|<0x[0-9a-f]{2}>|<loc_?\d+>|<(?:start|end)_of_\w+>|\[/?INST\]|<</?SYS>>|\[/?(?:IMG|BOS|EOS|PAD|UNK|SEP|CLS)\]"
    r"|Ċ|(?-i:\wĠ\w)|▁\w|\ufffd|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]",
    re.IGNORECASE,
)
_NAMES = (
    "p|br|b|i|u|em|strong|div|span|h[1-6]|ul|ol|li|code|pre|box|ref|quad|point|points|answer|caption|description|response"
    "|output|result|summary|conclusion|final|final_answer|tool_call|function|text|image|details"
)
_ROLE = r"(?:assistant|user|human|system|ai|bot|model|gpt)"
_MARKUP = re.compile(
    rf"</[a-z][\w:.-]*>|<(?:{_NAMES})(?:\s[^<>]*)?/?>|<[a-z]+ [a-z-]+=[^<>]*>|&(?:[a-z]{{2,6}}|#\d+);|```|!\[[^\]]*\]\("
    rf"|\\boxed\{{|^\s*(?:>|[-*•]|\d{{1,2}}[.)])\s|(?:^|\n)\s*[-*_]{{3,}}\s*(?:\n|$)|\s#[^\W\d]\w*(?:\s+#\w+)*\s*$"
    rf"|(?:^|\n)\s*\W{{0,3}}{_ROLE}\W{{0,2}}:|###\s*\w+|(?:^|\n)\s*#{{1,6}}\s|^\s*(?:assistant|model|analysis|final)\s*\n",
    re.IGNORECASE,
)
_JSON = re.compile(r"\s*[\[{]\s*[\"{\[].*[\]}]\s*", re.DOTALL)
_MOST_QUOTED = 200  # characters; an answer that is quoted as a whole is no quotation
_QUOTED = re.compile(
    "|".join(
        rf"{opening}[^{opening}{closing}\n]{{0,{_MOST_QUOTED}}}{closing}"
        for opening, closing in ("“”", "„“", "„”", "””", "”“", "«»", "»«", "‹›", "「」", "『』", "《》", '""', "‘’")
    )
    + rf"|(?<!\w)'[^'\n]{{1,{_MOST_QUOTED}}}'(?!\w)"
)


def without_thoughts(text: str) -> str | None:
    """The text behind the thoughts with which it begins; None if they have no end, or come later.

    An end without a beginning is that of thoughts too: some chat templates write the beginning themselves.
    """
    ends = list(_CLOSE.finditer(text))
    if ends:
        thoughts, text = text[: ends[-1].start()], text[ends[-1].end() :]
        begun = _OPEN.search(thoughts)
        if (begun and thoughts[: begun.start()].strip()) or not text.strip():
            return None
    return None if _OPEN.search(text) else text


def has_markup(text: str) -> bool:
    """Whether there are template tokens or broken bytes in a text, or outside of quotations other markup or roles."""
    return bool(_TOKENS.search(text) or _MARKUP.search(without_quotations(text)) or _JSON.fullmatch(text))


def without_quotations(text: str) -> str:
    """A text with “” for its short quotations: they are what a sign or a person in the picture says. An answer that is
    one as a whole is none, however short: Chinese says a prompt in few characters."""
    return text if _QUOTED.fullmatch(text.strip()) else _QUOTED.sub(" “” ", text)
