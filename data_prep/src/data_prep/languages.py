"""The thirty languages of the paper, by their ISO 639-1 codes."""

LANGUAGES = tuple(
    "ar bn zh da nl en fi fr ka de el hi id it ja ko lv no pl pt ro ru sk es sv th tr uk ur vi".split()  # noqa: SIM905
)

# How other sources write codes that are "no", "zh" and "pt" here.
OTHER_CODES = {"nb": "no", "zh_CN": "zh", "pt_BR": "pt"}


# ISO 639-2 and 639-3, with what stands for a macrolanguage, in the order of LANGUAGES.
_THREE_LETTERS = (
    "ara,arb ben zho,chi,cmn dan nld,dut eng fin fra,fre kat,geo deu,ger ell,gre hin ind ita jpn kor lav,lvs "
    "nor,nob,nno pol por ron,rum rus slk,slo spa swe tha tur ukr urd vie"
)
_TO_OURS = {
    **{code: ours for ours, codes in zip(LANGUAGES, _THREE_LETTERS.split(), strict=True) for code in codes.split(",")},
    **{code: code for code in LANGUAGES},
    "nb": "no",
    "nn": "no",
    "in": "id",
}


def house_language(code: str) -> str:
    """One of `LANGUAGES` for what others call it (en-US, zh_CN, deu_Latn, nb); other codes as they are."""
    return _TO_OURS.get(code.replace("_", "-").partition("-")[0].lower(), code)
