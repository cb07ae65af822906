"""The thirty languages of the paper, by their ISO 639-1 codes."""

LANGUAGES = tuple(
    "ar bn zh da nl en fi fr ka de el hi id it ja ko lv no pl pt ro ru sk es sv th tr uk ur vi".split()  # noqa: SIM905
)

# How other sources write codes that are "no", "zh" and "pt" here.
OTHER_CODES = {"nb": "no", "zh_CN": "zh", "pt_BR": "pt"}


def house_language(code: str) -> str:
    """The house's code of a language that others write in another way; the code itself if it is none of those."""
    return OTHER_CODES.get(code, code)
