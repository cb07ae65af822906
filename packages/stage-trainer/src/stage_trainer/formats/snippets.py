"""How each library loads an exported directory: the examples of its model card, which tests run (but for jina-clip's
published code, which is only on the hub)."""

from __future__ import annotations

import json
from typing import NamedTuple

TEXTS = '["a red apple", "ein roter Apfel"]'


class Model(NamedTuple):
    """What the examples depend on.

    Attributes:
        name: of the directory.
        dim: a Matryoshka dim to show; the width if there is none.
        max_length: tokens of a text.
        task: a task with an instruction, if there is one.
        adapter: the name of a kept adapter (a PEFT folder), the default one; None if there is none.
        any_mode: whether transformers' image processor takes pictures that are not RGB.
        text_projector, image_projector: the folders of a tower's projector, in `text/` and in `vision/`; none without
            one.
    """

    name: str
    dim: int
    max_length: int
    task: str | None
    adapter: str | None
    any_mode: bool
    text_projector: tuple[str, ...] = ()
    image_projector: tuple[str, ...] = ()


def trilith(model: Model) -> str:
    task = (
        f"\nqueries = model.encode_text(texts, task={_text(model.task)}, truncate_dim={model.dim})"
        if model.task
        else ""
    )
    return f"""\
from stage_trainer import DualEncoder

model = DualEncoder.from_pretrained({_text(model.name)})
texts = {TEXTS}
text = model.encode_text(texts, truncate_dim={model.dim})
image = model.encode_image(["photo.jpg"], truncate_dim={model.dim}){task}
print(text @ image.T)
"""


def sentence_transformers(model: Model) -> str:
    task = ""
    if model.task:
        task = f"\nqueries = model.encode(texts, prompt_name={_text(model.task)}, normalize_embeddings=True)"
    return f"""\
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({_text(model.name)}, truncate_dim={model.dim})
texts = {TEXTS}
text = model.encode(texts, normalize_embeddings=True)
image = model.encode([Image.open("photo.jpg"){_rgb(model)}], normalize_embeddings=True){task}
print(model.similarity(text, image))
"""


def transformers_texts(model: Model) -> str:
    projector = _Projector(f"{model.name}/text", model.text_projector)
    adapter = f"\nmodel.load_adapter({_text(f'{model.name}/text/{model.adapter}')})" if model.adapter else ""
    return f"""\
import torch{projector.imported}
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({_text(model.name)}, subfolder="text")
model = AutoModel.from_pretrained({_text(model.name)}, subfolder="text").eval(){adapter}{projector.read}
texts = {TEXTS}
batch = tokenizer(texts, padding=True, truncation=True, max_length={model.max_length}, return_tensors="pt")
with torch.no_grad():
    states = model(**batch).last_hidden_state
mask = batch["attention_mask"][..., None]
text = torch.nn.functional.normalize({projector.of("(states * mask).sum(1) / mask.sum(1)")}, dim=-1)
"""


def pipeline(model: Model) -> str:
    projector = _Projector(f"{model.name}/text", model.text_projector)
    return f"""\
import torch{projector.imported}
from transformers import pipeline

extract = pipeline("feature-extraction", model={_text(f"{model.name}/text")}){projector.read}
states = torch.tensor(extract("a red apple"))  # [1, tokens, width]
text = torch.nn.functional.normalize({projector.of("states.mean(1)")}, dim=-1)
"""


def transformers_images(model: Model) -> str:
    pillow = ', backend="pil"' if model.any_mode else ""
    projector = _Projector(f"{model.name}/vision", model.image_projector)
    return f"""\
import torch
from PIL import Image{projector.imported}
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained({_text(model.name)}, subfolder="vision"{pillow})
model = AutoModel.from_pretrained({_text(model.name)}, subfolder="vision").eval(){projector.read}
pixels = processor([Image.open("photo.jpg"){_rgb(model)}], return_tensors="pt").pixel_values
with torch.no_grad():
    image = torch.nn.functional.normalize({projector.of("model(pixels).pooler_output")}, dim=-1)
"""


def timm(model: Model) -> str:
    projector = _Projector(f"{model.name}/vision", model.image_projector)
    return f"""\
import timm
import torch
from PIL import Image{projector.imported}

model = timm.create_model({_text(f"local-dir:{model.name}/vision")}, pretrained=True).eval(){projector.read}
transform = timm.data.create_transform(**timm.data.resolve_data_config({{}}, model=model))
with torch.no_grad():
    image = model(transform(Image.open("photo.jpg").convert("RGB"))[None])
image = torch.nn.functional.normalize({projector.of("image")}, dim=-1)
"""


def jina_clip(model: Model) -> str:
    task = f", task={_text(model.task)}" if model.task else ""
    return f"""\
from transformers import AutoModel

model = AutoModel.from_pretrained({_text(model.name)}, trust_remote_code=True)
text = model.encode_text({TEXTS}{task}, truncate_dim={model.dim})
image = model.encode_image(["photo.jpg"], truncate_dim={model.dim})
print(text @ image.T)
"""


def open_clip(model: Model) -> str:
    return f"""\
import open_clip
import torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms({_text(f"local-dir:{model.name}")})
tokenizer = open_clip.get_tokenizer({_text(f"local-dir:{model.name}")})
model.eval()
with torch.no_grad():
    text = model.encode_text(tokenizer({TEXTS}), normalize=True)
    image = model.encode_image(preprocess(Image.open("photo.jpg"))[None], normalize=True)
print(text @ image.T)
"""


class _Projector(NamedTuple):
    """A tower's projector in an example: the import, lines that read it, and what it makes of a value."""

    place: str
    folders: tuple[str, ...]

    @property
    def imported(self) -> str:
        return "\nfrom safetensors.torch import load_file" if self.folders else ""

    @property
    def read(self) -> str:
        files = [_text(f"{self.place}/{folder}/model.safetensors") for folder in self.folders]
        names = ("first", "last")[2 - len(files) :]
        return "".join(f"\n{name} = load_file({file})" for name, file in zip(names, files, strict=True))

    def of(self, value: str) -> str:
        names = ("first", "last")[2 - len(self.folders) :]
        for name in names:
            value = f'torch.nn.functional.linear({value}, {name}["linear.weight"], {name}.get("linear.bias"))'
            value = f"torch.nn.functional.gelu({value})" if name == "first" else value
        return value


def _text(value: str) -> str:
    """A string as Python has it."""
    return json.dumps(value, ensure_ascii=False)


def _rgb(model: Model) -> str:
    return "" if model.any_mode else '.convert("RGB")'
