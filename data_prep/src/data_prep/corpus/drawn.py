"""A corpus that needs no packages: coloured shapes, described in eight languages. For tests and for other systems.

Every picture is a combination of shape, colour, size, place and background; shape and colour are the family, so the
held-out pictures show known shapes and colours in combinations that are new.
"""

from __future__ import annotations

import hashlib
import itertools
import math

from PIL import Image, ImageDraw

from data_prep.corpus.debian import Material
from data_prep.corpus.items import ImageItem
from data_prep.corpus.render import encode_png
from data_prep.errors import UserError
from data_prep.samples import Text

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "bar")
COLORS = {
    "red": (214, 39, 40),
    "blue": (31, 90, 200),
    "green": (30, 140, 60),
    "yellow": (240, 200, 20),
    "orange": (255, 127, 14),
    "purple": (130, 60, 170),
    "black": (20, 20, 20),
    "pink": (240, 130, 190),
}
SIZES = {"small": 0.16, "medium": 0.22, "large": 0.3}  # radius as part of the side
PLACES = {
    "top left": (0.3, 0.3),
    "top right": (0.7, 0.3),
    "centre": (0.5, 0.5),
    "bottom left": (0.3, 0.7),
    "bottom right": (0.7, 0.7),
}
GROUNDS = {
    "white": (255, 255, 255),
    "grey": (205, 205, 205),
    "light blue": (200, 225, 250),
    "light green": (210, 240, 205),
}

MOST = len(SHAPES) * len(COLORS) * len(SIZES) * len(PLACES) * len(GROUNDS)

# The words of the tables above in each language and the same order: shapes | colours | sizes | places | grounds. Each
# table is split at its commas if it has any, else at its spaces. The phrases below need no grammatical agreement.
_WORDS = {
    "en": "circle square triangle star cross ring diamond bar|red blue green yellow orange purple black pink|"
    "small medium large|top left,top right,in the centre,bottom left,bottom right|white,grey,light blue,light green",
    "de": "Kreis Quadrat Dreieck Stern Kreuz Ring Raute Balken|Rot Blau Grün Gelb Orange Lila Schwarz Rosa|"
    "klein mittelgroß groß|oben links,oben rechts,in der Mitte,unten links,unten rechts|Weiß,Grau,Hellblau,Hellgrün",
    "es": "círculo cuadrado triángulo estrella cruz anillo rombo barra|"
    "rojo azul verde amarillo naranja morado negro rosa|pequeño mediano grande|"
    "arriba a la izquierda,arriba a la derecha,en el centro,abajo a la izquierda,abajo a la derecha|"
    "blanco,gris,azul claro,verde claro",
    "fr": "cercle carré triangle étoile croix anneau losange barre|"
    "rouge bleue verte jaune orange violette noire rose|petite moyenne grande|"
    "en haut à gauche,en haut à droite,au centre,en bas à gauche,en bas à droite|blanc,gris,bleu clair,vert clair",
    "nl": "cirkel vierkant driehoek ster kruis ring ruit balk|rood blauw groen geel oranje paars zwart roze|"
    "klein middelgroot groot|linksboven,rechtsboven,in het midden,linksonder,rechtsonder|"
    "wit,grijs,lichtblauw,lichtgroen",
    "ru": "круг квадрат треугольник звезда крест кольцо ромб полоса|"
    "красного синего зелёного жёлтого оранжевого фиолетового чёрного розового|маленький средний большой|"
    "вверху слева,вверху справа,в центре,внизу слева,внизу справа|белый,серый,голубой,светло-зелёный",
    "tr": "daire,kare,üçgen,yıldız,haç,halka,eşkenar dörtgen,çubuk|kırmızı mavi yeşil sarı turuncu mor siyah pembe|"
    "küçük orta büyük|sol üstte,sağ üstte,ortada,sol altta,sağ altta|beyaz,gri,açık mavi,açık yeşil",
    "zh": "圆形 正方形 三角形 星形 十字 圆环 菱形 横条|红色 蓝色 绿色 黄色 橙色 紫色 黑色 粉色|"
    "小 中 大|左上方,右上方,正中,左下方,右下方|白色,灰色,浅蓝色,浅绿色",
}
_SHORT = {
    "en": "{color} {shape}, {size}, {place}, on {ground}",
    "de": "{shape} in {color}, {size}, {place}, auf {ground}",
    "es": "{shape} de color {color}, tamaño {size}, {place}, sobre {ground}",
    "fr": "{shape} de couleur {color}, de taille {size}, {place}, sur {ground}",
    "nl": "{shape} in {color}, {size}, {place}, op {ground}",
    "ru": "{shape} {color} цвета, размер {size}, {place}, фон {ground}",
    "tr": "{color} {shape}, {size} boy, {place}, {ground} zemin",
    "zh": "{color}{shape}，{size}，{place}，{ground}背景",
}
_LONG = {
    "en": "The picture shows one shape. Shape: {shape}. Colour: {color}. Size: {size}. Place: {place}. "
    "Ground: {ground}.",
    "de": "Das Bild zeigt eine Form. Form: {shape}. Farbe: {color}. Größe: {size}. Ort: {place}. Grund: {ground}.",
    "es": "La imagen muestra una forma. Forma: {shape}. Color: {color}. Tamaño: {size}. Lugar: {place}. "
    "Fondo: {ground}.",
    "fr": "L’image montre une forme. Forme : {shape}. Couleur : {color}. Taille : {size}. Place : {place}. "
    "Fond : {ground}.",
    "nl": "De afbeelding toont één vorm. Vorm: {shape}. Kleur: {color}. Grootte: {size}. Plaats: {place}. "
    "Achtergrond: {ground}.",
    "ru": "На картинке одна фигура. Фигура: {shape}. Фигура {color} цвета. Размер: {size}. Место: {place}. "
    "Фон: {ground}.",
    "tr": "Resimde bir şekil var. Şekil: {shape}. Renk: {color}. Boy: {size}. Yer: {place}. Zemin: {ground}.",
    "zh": "图中有一个图形。形状：{shape}。颜色：{color}。大小：{size}。位置：{place}。背景：{ground}。",
}
_ORIGIN = "synthetic:drawn"


def draw_material(number: int, *, seed: int, image_size: int) -> Material:
    """`number` different pictures, chosen among all combinations by a hash of the seed.

    Raises:
        UserError: fewer than 120 (pools too small to measure anything) or more than there are combinations.
    """
    if not 120 <= number <= MOST:
        raise UserError(f"--drawn {number}: expected a number from 120 to {MOST}")
    combinations = itertools.product(SHAPES, COLORS, SIZES, PLACES, GROUNDS)
    ranked = sorted(enumerate(combinations), key=lambda entry: hashlib.sha256(f"{seed}:{entry[0]}".encode()).digest())
    images = [_item(order, *attributes, image_size=image_size) for order, attributes in sorted(ranked[:number])]
    return Material(images=images, held_out={"drawn": number * 15 // 100})


def _item(order: int, shape: str, color: str, size: str, place: str, ground: str, *, image_size: int) -> ImageItem:
    names, long = [], []
    for language in _WORDS:
        words = _words(language, shape, color, size, place, ground)
        names.append(Text(_SHORT[language].format(**words), language, "name", _ORIGIN))
        long.append(Text(_LONG[language].format(**words), language, "long", _ORIGIN))
    return ImageItem(
        name=f"drawn-{order:04d}",
        source="drawn",
        long_source="drawn",
        group=(shape, color),
        order=order,
        labels=(f"drawn:{shape} {color}",),
        names=tuple(names),
        keywords=(),
        long=tuple(long),
        png=encode_png(_draw(shape, COLORS[color], SIZES[size], PLACES[place], GROUNDS[ground], image_size)),
    )


def _words(language: str, shape: str, color: str, size: str, place: str, ground: str) -> dict[str, str]:
    tables = [part.split("," if "," in part else " ") for part in _WORDS[language].split("|")]
    keys = (SHAPES, tuple(COLORS), tuple(SIZES), tuple(PLACES), tuple(GROUNDS))
    wanted = {"shape": shape, "color": color, "size": size, "place": place, "ground": ground}
    return {
        name: table[key.index(value)] for (name, value), key, table in zip(wanted.items(), keys, tables, strict=True)
    }


def _draw(
    shape: str, color: tuple[int, ...], radius: float, place: tuple[float, float], ground: tuple[int, ...], side: int
) -> Image.Image:
    scale = 4 * side  # supersampled, for smooth edges
    image = Image.new("RGB", (scale, scale), ground)
    pen = ImageDraw.Draw(image)
    x, y, r = place[0] * scale, place[1] * scale, radius * scale
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=color)
    elif shape == "star":
        pen.polygon(
            [_on_circle(x, y, r if corner % 2 == 0 else 0.4 * r, corner / 10) for corner in range(10)], fill=color
        )
    elif shape == "cross":
        pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=color)
        pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=color)
    elif shape == "ring":
        pen.ellipse(box, outline=color, width=round(r / 2.5))
    elif shape == "diamond":
        pen.polygon([_on_circle(x, y, r, corner / 4) for corner in range(4)], fill=color)
    else:
        pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=color)
    return image.resize((side, side), Image.Resampling.BOX)


def _on_circle(x: float, y: float, radius: float, turn: float) -> tuple[float, float]:
    """The point at this fraction of a full turn, clockwise from the top."""
    return x + radius * math.sin(2 * math.pi * turn), y - radius * math.cos(2 * math.pi * turn)
