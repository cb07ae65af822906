"""Danish, Norwegian (Bokmål) and Swedish by their spelling: letters, endings and words that not all of them have.

The three share most of their words and sequences of letters, so that statistics over these are unsure in short texts.
What sets them apart is spelling: "hvid", "hvit" and "vit", "-tion" and "-sjon", "af" and "av", "och" and "og".
"""

from __future__ import annotations

import functools
import re

# Words in small letters → which of the three languages have them. A word that is not here says nothing.
_SIGNS = {
    "sv": r"""
        \w*[äö]\w* \w*ck\w* \w{2,}(?:arna|orna|erna|ades?) \w{3,}ande och inte till att någon något några mellan
        utan vad vita? vitt upp mycket ska kallat kallas kallad medan gammal vatten sedan redan från hundra
        tjugo månad\w* kvinna kvinnor litet pojke\w* ljus\w* \w*arbet\w* spel\w* ger visar?
    """,
    "da": r"""
        \w*(?:øj|æj)\w* \w{2,}hed(?:en|er)? \w{2,}skab(?:et|er)? \w{3,}erne ud\w{3,} af os nogle noget nogen
        mellem uden bliver? hvad hvide? hvidt op ud \w*sprog\w* brug\w* \w+brug tager? siger? kager? \w*skib\w*
        bog uge gade vand\w* mand bag sidder kaldet kaldes kalder leger hedder vores \w*skov\w* hundrede\w*
        tusind\w* tyve kvinder? piger? dreng\w* fjeld\w* farver? vinduer? tag \w*arbej\w* spil forskel\w* giver?
        gives fuld\w* tynde? læg åbne\w* åben tyvende billet\w* dækket koldt kold
    """,
    "no": r"""
        \w+sjon(?:en|er|ene|s)? \w*øy\w* meg deg seg noen noe etter uten gjøre? hva hvite? hvitt ble opp mye nå
        \w*tegnspråk\w* kalt kalles vei veien brukes sier? kaker? \w*skip uke gate gata bak trær mann vann\w*
        glir myke? boka døra sola hylla å betyr nest hundre tjue kvinner? pike\w* jenter? fjell\w* farger?
        vinduet? \w*arbeid\w* spill\w* forskjell\w* gir legg sette(?:r|s)? åpne\w* åpen tjuende jobbe\w* kaldt
        dekket helga
    """,
    "no sv": r"""
        \w{2,}het(?:en|er)? \w{2,}skap(?:et|er)? \w+(?:nn|tt|kk|pp|mm|ss|gg|ll) av ut mot tar? mat bok blir? oss
        mynt \w*språk\w* bruk\w* sitter liten lite barn leker ett heter vår vårt våre olje\w*
    """,
    "da no": r"""
        \w*[æø]\w* \w{3,}ende \w*tegn\w* og ikke hvor hvis hvordan hvem til fra er hun jeg mens gammel gamle et
        der meget at andre samme lille mennesker?
    """,
    "da sv": r"""
        \w+tion(?:en|er|erne|erna|s)? efter blev nu glider mig dig sig betyder
    """,
}
_HAVING = [(frozenset(having.split()), re.compile("|".join(signs.split()))) for having, signs in _SIGNS.items()]
_ALL = frozenset(("da", "no", "sv"))
_QUOTED = re.compile(r"«[^»]*»|»[^«]*«|[“”\"][^“”\"]*[“”\"]")  # perhaps in another language


def contradictions(text: str) -> dict[str, int]:
    """The codes of the three languages → how many words of a text the language does not have.

    Words in capitals are names, perhaps.
    """
    words = [word for word in re.findall(r"\w+", _QUOTED.sub(" ", text)) if word.islower()]
    return {language: sum(language not in _languages_with(word) for word in words) for language in sorted(_ALL)}


@functools.lru_cache(maxsize=65536)
def _languages_with(word: str) -> frozenset[str]:
    """The languages that have a word; all three if nothing is known."""
    having = [languages for languages, signs in _HAVING if signs.fullmatch(word)]
    return (frozenset.intersection(*having) if having else _ALL) or _ALL
