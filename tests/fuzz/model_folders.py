"""Model folders: towers, adapters and whole models of our own and of others' forms."""

from __future__ import annotations

import io
import json
import pickle
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from fuzz.harness import Files, Kind
from fuzz.values import changed, damaged, dumped, json_bytes
from hypothesis import strategies as st

_POOLING = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "include_prompt": True}
_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
_TOKENIZER = {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 64, "bos_token": "<s>"}
TIMM = {
    "architecture": "eva02_large_patch14_clip_224", "num_classes": 0,
    "model_args": {"img_size": [16, 16], "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2,
    "num_classes": 0},
    "pretrained_cfg": {"input_size": [3, 16, 16], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "crop_pct": 1.0,
                       "interpolation": "bicubic", "crop_mode": "center", "num_classes": 0},
}  # fmt: skip
_JINA = {
    "model_type": "jina_clip",
    "vision_config": {"width": 32, "layers": 1, "head_width": 16, "patch_size": 8, "image_size": 16, "embed_dim": 32,
                      "pt_hw_seq_len": 16, "intp_freq": True, "subln": True, "rope_embeddings": True,
                      "naive_swiglu": True,
                      "mlp_ratio": 2.6667},
}  # fmt: skip
_OPEN_CLIP = {
    "model_cfg": {"embed_dim": 32, "vision_cfg": {"timm_model_name": "eva02_base_patch16_clip_224", "image_size": 16,
                  "timm_model_pretrained": False, "timm_pool": "token", "timm_proj": None}},
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic",
    "resize_mode": "shortest"},
}  # fmt: skip
_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "crop_size": {"height": 16,
    "width": 16},
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_resize": True, "do_normalize": True, "resample": 3,
}  # fmt: skip


def _load(folder: Path) -> None:
    """Load the folder's model, as the file "loader" says, and use it: what is accepted has to work."""
    from stage_trainer.dual_encoder import DualEncoder
    from text_tower import TextTower
    from text_tower.pretrained import read_config
    from vision_tower import VisionTower

    warnings.simplefilter("ignore")
    loader, model = (folder / "loader").read_text(), folder / "model"
    if loader == "text":
        read_config(model)
        tower = TextTower.from_pretrained(model)
        if tower.tokenizer is not None:
            tower.encode(["a b"])
    elif loader == "peft":
        TextTower.from_pretrained(model, peft={"new": model / "retrieval.query"})
    elif loader == "vision":
        VisionTower.from_pretrained(model)
    elif loader == "headless":
        VisionTower.from_pretrained(model, num_classes=0)
    else:
        DualEncoder.from_pretrained(model)


@cache
def _sentencepiece() -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    texts = ["the quick brown fox jumps over the lazy dog", "a b c d e f g h", "one two three"] * 8
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    return model.getvalue()


@cache
def whole_folders() -> dict[str, Files]:
    """Whole folders, by what loads them and how they were written."""
    import torch
    from stage_trainer.dual_encoder import DualEncoder
    from stage_trainer.formats import open_clip
    from text_tower import TextTower, TextTowerConfig
    from text_tower.tokenizer import Tokenizer
    from vision_tower import VisionTower, VisionTowerConfig

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "sentencepiece.bpe.model").write_bytes(_sentencepiece())
        tokenizer = Tokenizer.from_file(place / "sentencepiece.bpe.model")
        shape = {"vocab_size": 64, "width": 32, "layers": 1, "heads": 2, "mlp_width": 48, "max_length": 64}
        lora = {"adapters": ("retrieval.query", "second"), "lora_rank": 2, "lora_alpha": 2.0}
        text = TextTower(TextTowerConfig(**shape, **lora), tokenizer)  # type: ignore[arg-type]
        plain = TextTower(TextTowerConfig(**shape), tokenizer)  # type: ignore[arg-type]
        fitting = TextTower(TextTowerConfig(**{**shape, "vocab_size": tokenizer.vocab_size}), tokenizer)  # type: ignore[arg-type]
        small: dict[str, Any] = {"patch": 8, "width": 32, "layers": 1, "heads": 2, "mlp_width": 85}
        vision = VisionTower(VisionTowerConfig(resolution=16, **small))
        for tower in (text, plain, fitting, vision):
            for parameter in tower.parameters():  # of one value: the corpus packs it to nothing
                torch.nn.init.constant_(parameter, 0.02)
        text.save_pretrained(place / "text")
        text.save_pretrained(place / "peft", layout="peft")
        text.save_pretrained(place / "remote", layout="remote-code")
        plain.save_pretrained(place / "plain")
        vision.save_pretrained(place / "vision")
        DualEncoder(plain, vision, matryoshka_dims=(32, 16)).save_pretrained(place / "whole")
        open_clip.write(DualEncoder(fitting, vision), place / "clip", "some/model", lambda _: "")
        stored = {one: _read(place / one) for one in ("text", "peft", "remote", "plain", "vision", "whole", "clip")}
    adapted = {n: c for n, c in stored["peft"].items() if n.startswith("model/retrieval.query/")}
    weights = {"model/model.safetensors": stored["vision"]["model/model.safetensors"]}
    sentences = {
        "model/modules.json": dumped(_MODULES),
        "model/1_Pooling/config.json": dumped(_POOLING),
        "model/tokenizer_config.json": dumped(_TOKENIZER),
        "model/config_sentence_transformers.json": dumped(
            {"prompts": {"query": "find: "}, "default_prompt_name": None}
        ),
        "model/sentence_bert_config.json": dumped({"max_seq_length": 32, "do_lower_case": False}),
    }
    return {
        "text/ours": stored["text"],
        "text/peft": stored["peft"],
        "text/remote": stored["remote"],
        "text/sentences": {**stored["plain"], **sentences},
        "peft/folder": {**stored["plain"], **adapted},
        "vision/ours": stored["vision"],
        "vision/timm": {**weights, "model/config.json": dumped(TIMM)},
        "vision/jina": {
            **weights,
            "model/config.json": dumped(_JINA),
            "model/preprocessor_config.json": dumped(_PROCESSOR),
        },
        "headless/open_clip": {**weights, "model/open_clip_config.json": dumped(_OPEN_CLIP)},
        "whole/ours": stored["whole"],
        "whole/open_clip": stored["clip"],
    }


def _read(folder: Path) -> Files:
    return {f"model/{p.relative_to(folder)}": p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@st.composite
def _cases(draw: st.DrawFn) -> Files:
    variant = draw(st.sampled_from(sorted(whole_folders())))
    files = dict(whole_folders()[variant])
    configurations = [name for name in files if name.endswith(".json")]
    for name in draw(
        st.lists(st.sampled_from(configurations * 4 + sorted(files)), min_size=1, max_size=2, unique=True)
    ):
        how = draw(st.sampled_from(("change",) * 8 + ("remove", "pickle")))
        if how == "remove":
            del files[name]
        elif how == "pickle" and name.endswith(".safetensors"):
            del files[name]
            stem = {"adapter_model": "adapter_model"}.get(Path(name).stem, "pytorch_model")
            files[str(Path(name).with_name(f"{stem}.bin"))] = draw(_pickles())
        else:
            files[name] = draw(_changed_file(name, files[name]))
    if variant == "vision/timm" and draw(st.booleans()):
        config = json.loads(dumped(TIMM))
        option = draw(
            st.sampled_from(
                ("checkpoint_path", "pretrained_cfg_overlay", "cache_dir", "img_size", "act_layer", "scriptable")
            )
        )
        config["model_args"][option] = draw(
            st.sampled_from(("model.safetensors", "../loader", 1, [], {"url": "http://127.0.0.1:1/"}))
        )
        files["model/config.json"] = dumped(config)
    return {"loader": variant.partition("/")[0].encode(), **files}


def _changed_file(name: str, content: bytes) -> st.SearchStrategy[bytes]:
    if name.endswith(".json"):
        return json_bytes(json.loads(content))
    if name.endswith(".safetensors"):
        size = int.from_bytes(content[:8], "little")
        header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
        return st.one_of(
            damaged(content),
            changed(header).map(dumped).map(lambda raw: len(raw).to_bytes(8, "little") + raw + rest),
            st.integers(0, 2**64 - 1).map(lambda number: number.to_bytes(8, "little") + content[8:]),
        )
    return damaged(content)


class _Program:
    """Runs a program where it is unpickled carelessly."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("true",)


@cache
def pickled() -> list[bytes]:
    import torch

    found = [pickle.dumps(_Program()), pickle.dumps({"a": 1}), pickle.dumps([1]), b"", b"PK\3\4"]
    for content in ({"a": torch.zeros(2)}, {"a": 1}, [1], _Program(), {1: torch.zeros(2)}, torch.zeros(2)):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        found.append(buffer.getvalue())
    return found


def _pickles() -> st.SearchStrategy[bytes]:
    return st.sampled_from(pickled()).flatmap(lambda content: st.one_of(st.just(content), damaged(content)))


def _valid() -> list[Files]:
    """All but open_clip's: its timm names are of large towers, so these small weights do not fit."""
    folders = {variant: files for variant, files in whole_folders().items() if variant != "headless/open_clip"}
    return [{"loader": variant.partition("/")[0].encode(), **files} for variant, files in folders.items()]


KINDS = [Kind("models", _load, _valid, _cases, megabytes=512)]
