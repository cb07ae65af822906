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
        \w*[äö]\w* \w*ck\w* \w{2,}(?:arna|orna|erna|ades?) \w{3,}(?<!st)ande och inte till att någon något några mellan
        utan vad vita? vitt upp mycket ska kallat kallas kallad medan gammal vatten sedan redan från hundra
        tjugo månad\w* kvinna kvinnor litet pojke\w* ljus\w* \w*arbet\w* spel\w* ger visar?
    """,
    "da": r"""
        \w*(?:øj|æj)\w* \w{2,}hed(?:en|er)? \w{2,}skab(?:et|er)? \w{3,}erne ud\w{3,} af os nogle noget nogen
        mellem uden bliver? hvad hvide? hvidt op ud \w*sprog\w* brug\w* \w+brug tager? siger? kager? \w*skib\w*
        bog uge gade vand\w* mand bag sidder kaldet kaldes kalder leger hedder vores \w*skov\w* hundrede\w*
        tusind\w* tyve kvinder? piger? dreng\w* fjeld\w* farver? vinduer? tag \w*arbej\w* spil forskel\w* giver?
        gives fuld\w* tynde? åbne\w* åben tyvende billet\w* koldt kold
        \w*æ[bdfgkmnv]\w* \w*(?:læs|præs|græs|næst|sæt|tæt|jælp|tæll|fælle|vælg|sælg|gæld|mælk|bælt|hæld|vælt)\w*
        \w*(?:søg|bøg|nøgl)\w* billed\w* adgangskode\w*
        \w{2,}(?:is|iv|ul|id|ic|ik|ur|og|um|ll|in|gn)ere(?:de?|t)s?
        \w*(?:fejl|vej|rejs|sejl|plej)\w* i?gennem\w* kend(?:e|er|es|te?)\w* kør(?:e|er|te?|sel)\w* gør(?:e|es)? køb\w*
        find(?:e|er|es) ind(?:hold|tast|stil|gå|led|byg|før|kom|sam|send|del|til|eholde)\w*
        tillad\w* understøt\w* nulstil\w* oplys\w* yderligere nemt? nemme\w*
        af(?:slut|vis|tal|bryd|del|stand|send|vikl|spil|lever|gang|gør|vent|snit|bild|mon)\w* måde[nr]? hvornår
        (?:ud|ind|over|for|be|op)?(?:gået|stået|fået|nået) jer jeres hendes blandt altid måske endnu
        sidst\w* \w*(?:vigtig|rigtig|pligt|frygt)\w* ugentlig\w* almindelig\w* tjek\w* fundet
        (?:over|fast|ind|fort|an)sat overvåg\w* venlig\w* bogstav\w* understreg\w* websted\w* dejlig\w* morgenmad
    """,
    "no": r"""
        \w+sjon(?:en|er|ene|s)? \w*øy\w* meg deg seg noen noe etter uten gjøre? hva hvite? hvitt ble opp mye nå
        \w*tegnspråk\w* kalt kalles vei veien brukes sier? kaker? \w*skip uke gate gata bak trær mann vann\w*
        glir myke? boka døra sola hylla \w*fila å betyr nest hundre tjue kvinner? pike\w* jenter? fjell\w* farger?
        vinduet? \w*arbeid\w* spill\w* forskjell\w* gir legg sette(?:r|s)? åpne\w* åpen tjuende jobbe\w* kaldt
        dekket helga
        \w*(?:søk|bøk|nøkk)\w* øk(?:e|er|te?|ning\w*)
        \w{3,}(?:is|ll|iv|ul|nt|tr|id|it|in|at|ik|on|ur|or|am|og|em|um|us|nn)ert(?:e|es)?
        \w*(?:feil|vei|reis|seil|plei)\w* i?gjen\w* \w*gjeng\w* kjen\w* kjø\w* \w*skjerm\w* skjer gjel\w* gjør\w*
        inn(?:hold|still|logg|les|sett|gå|led|byg|før|kom|kjøp|sam|send|del|til)\w* (?:for)?endr\w* lenke\w* tillat\w*
        nett(?:side|sted|les|verk|adresse|tjen)\w* \w+(?<!s)sett(?:e|es|er|else\w*|ing\w*) finne finnes funnet mellom
        \w*(?:lisens|aksept|sentral|prosess|suksess|prosent)\w* \w*grunn\w* gitte? blitt tatt dere blant aldri
        krev\w* les(?:e|er|es|te?) \w*(?:sertifi|spesi)\w* ukentlig\w* sjekk\w* vennlig\w* understrek\w*
        velg\w* hendels\w* \w*passord\w* inn angre[st]? \w*bilde[rt]?
        kanskje ennå neste måte[nr]? takk \w*(?:frykt|slekt)\w* opplys\w* ytterligere
    """,
    "no sv": r"""
        \w{2,}het(?:en|er)? \w{2,}skap(?:et|er)?
        (?!(?:access|all|app|class|cross|full|install|less|null|press|process|pull|shell|will)$)\w+(?:nn|tt|kk|pp|mm|ss|gg|ll)
        av ut mot tar? mat bok blir? oss
        ut(?:gå|gi|før|fyll|vikl|skrift|valg|lån|seende|løp|trykk|nytt)\w*
        av(?:slut|vis|tal|bryt|del|stand|send|vik|spill|lever|gang|vent|snitt)\w*
        viktig\w* riktig\w* vanlig\w* bokstav\w* \w*plikt\w* alltid hennes? siste hatt
        mynt \w*språk\w* bruk\w* sitter liten lite barn leker ett heter vår vårt våre olje\w*
    """,
    "da no": r"""
        \w*[æø]\w* \w{3,}ende \w*tegn\w* og ikke hvor hvis hvordan hvem til fra er hun jeg mens gammel gamle et
        der meget at andre samme lille mennesker?
    """,
    "da sv": r"""
        \w{2,}igt igen sådan haft \w*(?:proces|licens|accept|central|certifi|speci)\w* \w*grund(?:en|er|lag\w*)? aldrig
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
