"""How ONNX Runtime and transformers.js open a directory of `formats.onnx`: the examples of its model card, which tests
run."""

from __future__ import annotations

import json
import math
from typing import NamedTuple

from text_tower import TextTowerConfig
from text_tower.st_folder import MAX_LENGTH
from vision_tower import VisionTowerConfig
from vision_tower.config import as_pair

from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.formats.onnx import PRECISIONS
from stage_trainer.formats.snippets import TEXTS


class _Model(NamedTuple):
    name: str
    text: TextTowerConfig
    vision: VisionTowerConfig
    precision: str

    def file(self, graph: str) -> str:
        return json.dumps(f"{self.name}/onnx/{graph}{PRECISIONS[self.precision]}.onnx", ensure_ascii=False)

    @property
    def max_length(self) -> int:
        return min(MAX_LENGTH, self.text.max_length)


def paragraphs(name: str, model: DualEncoder, precision: str | None) -> list[str]:
    """The card's paragraphs on its use.

    Args:
        name: of the directory, under which the examples open it.
        precision: the only one of `PRECISIONS` that it has; None if it has all.
    """
    about = _Model(name, model.text.config, model.vision.config, precision or "float32")
    written = [precision] if precision else list(PRECISIONS)
    files = ", ".join(f"`…{PRECISIONS[each]}.onnx` ({each})" for each in written)
    return [
        f"`onnx/` has `text_model`, `vision_model`, and both in `model`, each complete in itself: {files}. They "
        "take any number of texts, tokens and images. `text_embeddings` and `image_embeddings` are the towers', "
        f"`l2norm_…` those at length one. An id of {about.text.pad_id} is padding. What `model` lacks is "
        f"given as one such id a text, `[[{about.text.pad_id}]]`, or as no picture, and its output has no meaning. "
        "`float16` computes as PyTorch does in it; in `int8` a vector depends a little on what else is in the "
        "batch, which has one range of numbers.",
        f"The examples run where `{name}` and a `photo.jpg` are.",
        "**ONNX Runtime** (with numpy, Pillow and tokenizers)",
        f"```python\n{onnxruntime(about)}```",
        "**transformers.js** (4 or newer; in a browser, remove the three lines on where files are)",
        f"```js\n{transformers_js(about)}```",
        "Its resizing is not Pillow's: photos get other pixels than in training, and slightly other vectors. It "
        f"cuts a text of more than {about.max_length} tokens without keeping the last, `</s>`.",
        *_instructions(about.text),
    ]


def onnxruntime(model: _Model) -> str:
    vision = model.vision
    height, width = as_pair(vision.resolution)
    whole = math.floor(height / vision.crop_pct)
    kernel = f"Image.Resampling.{vision.interpolation.upper()}"
    if vision.crop_mode == "squash":
        resize = f"image = image.resize(({math.floor(width / vision.crop_pct)}, {whole}), {kernel})"
    else:
        resize = f"image = image.resize([{whole} * side // min(image.size) for side in image.size], {kernel})"
    return f"""\
import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file({json.dumps(f"{model.name}/tokenizer.json", ensure_ascii=False)})
tokenizer.enable_padding(pad_id={model.text.pad_id}, pad_token="<pad>")
tokenizer.enable_truncation({model.max_length})
texts = {TEXTS}
ids = np.array([found.ids for found in tokenizer.encode_batch(texts)])
session = onnxruntime.InferenceSession({model.file("text_model")})
(text,) = session.run(["l2norm_text_embeddings"], {{"input_ids": ids}})

image = Image.open("photo.jpg").convert("RGB")
{resize}
left, top = round((image.width - {width}) / 2), round((image.height - {height}) / 2)
image = image.crop((left, top, left + {width}, top + {height}))
mean, std = {list(vision.mean)}, {list(vision.std)}
pixels = (np.asarray(image, np.float32) / 255 - mean) / std
pixels = pixels.transpose(2, 0, 1)[None].astype(np.float32)
session = onnxruntime.InferenceSession({model.file("vision_model")})
(image,) = session.run(["l2norm_image_embeddings"], {{"pixel_values": pixels}})
print(text @ image.T)
"""


def transformers_js(model: _Model) -> str:
    dtype = {"float32": "fp32", "float16": "fp16"}.get(model.precision, model.precision)
    name = json.dumps(model.name, ensure_ascii=False)
    return f"""\
import {{ AutoModel, AutoProcessor, RawImage, env, matmul }} from "@huggingface/transformers";

// The directory is here and not on a hub.
env.allowRemoteModels = false;
env.localModelPath = "./";

const processor = await AutoProcessor.from_pretrained({name});
const model = await AutoModel.from_pretrained({name}, {{ dtype: "{dtype}" }});
const texts = {TEXTS};
const images = [await RawImage.read("photo.jpg")];
const inputs = await processor(texts, images, {{ padding: true, truncation: true, max_length: {model.max_length} }});
const {{ l2norm_text_embeddings: text, l2norm_image_embeddings: image }} = await model(inputs);
console.log((await matmul(text, image.transpose(1, 0))).tolist());
"""


def _instructions(config: TextTowerConfig) -> list[str]:
    """Graphs know no tasks."""
    said = [task for task in config.tasks if config.instructions.get(task)]
    return (
        [f"Put the instruction of {', '.join(f'`{task}`' for task in said)} (above) before a text yourself."]
        if said
        else []
    )
