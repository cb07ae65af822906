"""The thirty languages of the paper, by their ISO 639-1 codes."""

LANGUAGES = tuple(
    "ar bn zh da nl en fi fr ka de el hi id it ja ko lv no pl pt ro ru sk es sv th tr uk ur vi".split()  # noqa: SIM905
)

# How other sources write codes that are "no", "zh" and "pt" here.
OTHER_CODES = {"nb": "no", "zh_CN": "zh", "pt_BR": "pt"}
