"""The model card, README.md of an exported directory: what the model is, how to use it, how it came to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import yaml

from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.evaluation.tables import Figures, Pools
from stage_trainer.formats import snippets
from stage_trainer.formats.common import Adapters
from stage_trainer.formats.history import NON_COMMERCIAL, History

_TAGS = ["trilith", "feature-extraction", "sentence-similarity", "image-text-retrieval", "multimodal", "matryoshka"]

_TEXT_TOWERS = {"rotary": "XLM-RoBERTa with rotary positions", "alibi": "JinaBERT with ALiBi"}


def card(
    name: str,
    model: DualEncoder,
    adapters: Adapters,
    history: History,
    form: str = "common",
    precision: str | None = None,
) -> str:
    """The card of an exported directory.

    Args:
        name: of the directory, under which the examples load it.
        model: as it is written.
        adapters: what became of its adapters.
        history: how it came to be.
        form: "common", "jina-clip", "jina-clip-v1", "open-clip" or "onnx": which module of `formats` writes the
            directory.
        precision: of "onnx", what all graphs are in; None if there are all.
    """
    uses = {"common": _use, "jina-clip": _use_as_jina_clip, "open-clip": _use_in_open_clip}
    uses["jina-clip-v1"] = partial(_use_as_jina_clip, version="jina-clip-v1")
    uses["onnx"] = partial(_use_as_graphs, precision)
    parts = [
        _front(adapters, history, form),
        f"# {name}",
        _about(model),
        _adapters(adapters, name, form),
        "## Use",
        *uses[form](name, model, adapters),
        "## How it was made",
        *_made(history),
        "## Figures",
        *_figures(history.pools),
        "## Licence",
        _licence(history),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _front(adapters: Adapters, history: History, form: str) -> str:
    """The head that a hub reads."""
    library, task, tags = {
        "common": ("sentence-transformers", "sentence-similarity", ["sentence-transformers"]),
        "jina-clip": ("transformers", "feature-extraction", ["custom_code"]),
        "jina-clip-v1": ("transformers", "feature-extraction", ["custom_code"]),
        "open-clip": ("open_clip", "zero-shot-image-classification", ["open_clip"]),
        "onnx": ("transformers.js", "feature-extraction", ["transformers.js", "onnx"]),
    }[form]
    if form == "common" and adapters.kept:
        library, task, tags = "transformers", "feature-extraction", ["peft"]
    head = {
        "library_name": library,
        "pipeline_tag": task,
        "tags": _TAGS + tags,
        **({"language": history.languages} if history.languages else {}),
        **({"license": history.licence} if history.licence else {}),
        **({"base_model": list(history.bases)} if history.bases else {}),
    }
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---"


def _about(model: DualEncoder) -> str:
    text, vision = model.text.config, model.vision.config
    size = vision.resolution if isinstance(vision.resolution, tuple) else (vision.resolution, vision.resolution)
    sizes = [sum(p.numel() for p in tower.parameters()) for tower in (model.text, model.vision)]
    dims = ", ".join(map(str, model.matryoshka_dims or ()))
    said = {task: found for task, found in text.instructions.items() if found}
    tasks = "".join(f"\n- Task `{task}` puts {found!r} before a text." for task, found in said.items())
    return f"""\
A text encoder and an image encoder that share one space: vectors of texts and images are compared by their cosine.

- Texts: {_TEXT_TOWERS[text.positions]}, {text.layers} layers, {text.width} wide, {text.vocab_size:,} tokens in the \
vocabulary, up to {text.max_length:,} tokens of a text, {sizes[0]:,} parameters; the mean over \
tokens{_projected(text.projector)}.
- Images: EVA02, {vision.layers} layers, {vision.width} wide, {size[0]}x{size[1]} pixels in patches of {vision.patch}, \
{sizes[1]:,} parameters; the class token{_projected(vision.projector)}.
- Vectors: {text.output_width} numbers. {f"Trained to be cut to their first {dims} (Matryoshka)." if dims else ""} \
Cut first, then scale to length one.{tasks}"""


def _projected(width: int) -> str:
    return f", projected to {width}" if width else ""


def _adapters(adapters: Adapters, name: str, form: str) -> str:
    """Of the text tower; the image tower's is merged wherever there is a card."""
    if adapters.merged:
        lost = ", ".join(f"`{adapter}`" for adapter in adapters.left_out)
        rest = f" The adapters {lost} are not in this directory." if lost else ""
        return f"The LoRA adapter `{adapters.merged[0]}` is merged into the weights: do not apply it again.{rest}"
    if adapters.kept and form == "jina-clip":
        return f"The LoRA adapter `{adapters.kept[0]}` is kept apart in the weights, and always on."
    if adapters.kept:
        folders = ", ".join(f"`text/{adapter}`" for adapter in adapters.kept)
        return (
            f"The LoRA adapters are kept apart: `text/model.safetensors` are weights without them, and {folders} are "
            f"PEFT folders. The model's vectors are those with `{adapters.kept[0]}`; Trilith applies it by itself, "
            "transformers and PEFT when told to (below). sentence-transformers does not open this directory, since it "
            "would encode without an adapter: export with `--lora merged` for it."
        )
    return "It has no LoRA adapters."


def _model(name: str, model: DualEncoder, adapters: Adapters) -> snippets.Model:
    """What the examples depend on."""
    from text_tower import projector as of_texts
    from text_tower.st_folder import MAX_LENGTH
    from vision_tower import projector as of_images
    from vision_tower.foreign import processor_values

    text = model.text.config
    return snippets.Model(
        name=name,
        dim=min(model.matryoshka_dims or (text.output_width,)),
        max_length=min(MAX_LENGTH, text.max_length),
        task=next((task for task in text.tasks if text.instructions.get(task)), None),
        adapter=next(iter(adapters.kept), None),
        any_mode=processor_values(model.vision.config) is not None,
        text_projector=tuple(dense.folder for dense in of_texts.denses(text)),
        image_projector=tuple(dense.folder for dense in of_images.denses(model.vision.config)),
    )


def _use(name: str, model: DualEncoder, adapters: Adapters) -> list[str]:
    about = _model(name, model, adapters)
    parts = [
        f"The examples run where `{name}` and a `photo.jpg` are. Of a model on a hub, download the directory first "
        f"(`huggingface_hub.snapshot_download`), or use its name in place of `{name}` where no folder follows it.",
        "**Trilith**",
        _code(snippets.trilith(about)),
    ]
    if not adapters.kept:
        parts += [
            "**sentence-transformers** (6 or newer, with timm; no remote code)",
            _code(snippets.sentence_transformers(about)),
            "It cuts vectors after it has normalised them: with a `truncate_dim` they have length one only with "
            "`normalize_embeddings=True`. Texts are cut at "
            f"{about.max_length} tokens; set `model.max_seq_length` for more.",
        ]
    return [
        *parts,
        "**transformers** (5.4 or newer), texts",
        _code(snippets.transformers_texts(about)),
        "`pooler_output` is of no use: this model has no pooler, and its weights are stored as zeros.",
        *([] if adapters.kept else ["The same as a pipeline:", _code(snippets.pipeline(about))]),
        "**transformers**, images (with timm installed)",
        _code(snippets.transformers_images(about)),
        _pixels(about.any_mode),
        "**timm**, images",
        _code(snippets.timm(about)),
    ]


def _use_as_jina_clip(name: str, model: DualEncoder, adapters: Adapters, version: str = "jina-clip-v2") -> list[str]:
    about = _model(name, model, adapters)
    return [
        f"The examples run where `{name}` and a `photo.jpg` are. The directory has the layout of {version}.",
        "**Trilith**",
        _code(snippets.trilith(about)),
        "**transformers** (4.49; below 5), with the published code, which it fetches from the hub as `auto_map` says",
        _code(snippets.jina_clip(about)),
        "The published code cuts texts at 512 tokens, the instruction included.",
    ]


def _use_in_open_clip(name: str, model: DualEncoder, adapters: Adapters) -> list[str]:
    from stage_trainer.formats.open_clip import context_length

    about = _model(name, model, adapters)
    said = model.text.config.instructions.get(about.task, "") if about.task else ""
    projected = model.text.config.projector or model.vision.config.projector
    return [
        *([] if projected else ["**Trilith**", _code(snippets.trilith(about))]),
        "**open_clip** (3.3, with transformers 5.4 or newer and timm)",
        _code(snippets.open_clip(about)),
        f"It pads every text to {context_length(model.text.config)} tokens, which costs time; "
        "`tokenizer(texts, context_length=77)` cuts and pads to fewer. Before that it repairs broken Unicode and HTML "
        "entities and joins white space, as Trilith does not. It takes pictures as they are stored: turn photos by "
        "`PIL.ImageOps.exif_transpose`, and put transparent ones on white, before.",
        *([f"It has no instructions: put {said!r} before a query yourself."] if said else []),
        "The towers are made by what `open_clip_config.json` names (this directory where it was written, or a "
        "repository of a hub): elsewhere export it again.",
    ]


def _use_as_graphs(precision: str | None, name: str, model: DualEncoder, adapters: Adapters) -> list[str]:
    from stage_trainer.formats.onnx.examples import paragraphs

    return paragraphs(name, model, precision)


def _code(text: str) -> str:
    return f"```python\n{text}```"


def _pixels(any_mode: bool) -> str:
    if not any_mode:
        return (
            "Pictures are brought to size by timm's own steps, which take RGB alone; Trilith takes any mode, and puts "
            "transparent pictures on white."
        )
    return (
        "Pictures may be of any mode; transparent ones are put on white. Resized by Pillow (`backend='pil'`, which "
        "sentence-transformers is told to use, too) the pixels are Trilith's and timm's, with one difference: where "
        "the longer side exceeds the crop by 3, 7, 11, … pixels, transformers cuts out a square that begins one pixel "
        "earlier. Its torchvision backend resizes by another kernel. Neither turns a photo by its EXIF orientation, "
        "as Trilith does: `PIL.ImageOps.exif_transpose(image)` does it."
    )


def _made(history: History) -> list[str]:
    if not history.stages:
        return ["It was exported from a directory that does not say how it was trained."]
    weights = ", ".join(f"`{name}`" for name in history.weights) or "random weights"
    parts = [f"Trained with Trilith, from {weights}, stage by stage:"]
    for stage in history.stages:
        rows = [("steps", f"{stage.state.get('step', 0):,}")]
        rows += [(word, _plain(value)) for word, key in _SETTINGS.items() if (value := stage.setting(key)) is not None]
        rows += [("data", ", ".join(f"`{name}`" for name in stage.sources()))]
        if drawn := sum(stage.state.get("texts_drawn", {}).values()):
            rows.append(("texts seen", f"{drawn:,}"))
        rows += [("hours in steps", f"{stage.state.get('seconds', 0) / 3600:.2f}")]
        parts += [_table([stage.name, ""], rows)]
    versions = history.stages[-1].state.get("versions", {})
    return [*parts, ", ".join(f"{name} {version}" for name, version in versions.items())]


_SETTINGS = {
    "resolution": "stage.resolution",
    "tokens of a text": "stage.max_tokens",
    "images in a batch": "stage.batch.image_text",
    "text pairs in a batch": "stage.batch.text",
    "learning rate, image tower": "stage.lr.image",
    "learning rate, text tower": "stage.lr.text",
    "loss": "stage.loss.kind",
    "Matryoshka dims": "stage.loss.dims",
    "optimizer": "optimizer.name",
    "precision": "precision",
    "seed": "seed",
}
"""What of the recipe is shown, by the flat names of state.json."""


def _plain(value: object) -> str:
    return str(value).replace("|", "\\|")


def _figures(pools: Pools) -> list[str]:
    """Every figure by language and dim, in percent."""
    if not pools:
        return ["Not measured. `stage-trainer evaluate` measures a stage; an export of it then shows the figures here."]
    parts = []
    for name, pool in pools.items():
        for title, by_dim in _measures(pool):
            dims = sorted(by_dim, key=int, reverse=True)
            languages = list(by_dim[dims[0]])
            rows = [[of, *(f"{100 * by_dim[d][of]:.1f}" if of in by_dim[d] else "" for d in dims)] for of in languages]
            parts += [f"`{name}`, {title}, %", _table(["language", *(f"{d} dims" for d in dims)], rows)]
        if chance := pool.get("chance"):
            levels = ", ".join(f"{direction} {100 * level['mean']:.1f}" for direction, level in chance.items())
            parts.append(f"A blind guess has {levels}.")
    return parts


def _measures(pool: Figures) -> list[tuple[str, Mapping[str, Mapping[str, float]]]]:
    found: list[tuple[str, Mapping[str, Mapping[str, float]]]]
    found = [(f"recall@5, {d}", by_dim) for d, by_dim in pool.get("recall_at_5", {}).items()]
    found += [(f"nDCG@5, {d}", by_dim) for d, by_dim in pool.get("ndcg_at_5", {}).items()]
    return found + ([("nDCG@10", by_dim)] if (by_dim := pool.get("ndcg_at_10")) else [])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _licence(history: History) -> str:
    lines = [
        f"- `{name}` is under {licence.upper() if licence else 'a licence that could not be found out'}."
        for name, licence in history.weights.items()
    ]
    if history.licence == NON_COMMERCIAL:
        lines.append(
            "\nWhat is trained from CC-BY-NC-4.0 weights stays under its terms: not for commercial use, and with the "
            "name of its authors."
        )
    elif None in history.weights.values():
        lines.append("\nFind out the licence of these weights before you publish or sell what came from them.")
    elif lines:
        lines.append("\nMIT allows any use; its notice goes with copies.")
    else:
        lines.append("No weights of others went into this model. Its own licence is for its owner to state.")
    return "\n".join(lines)
