"""Both towers beside the libraries that others use, at the same work: timm's EVA02, sentence-transformers' text model.

Forward and backward in bfloat16, the same shapes. Texts have mixed lengths, half of the longest on average, and only
real tokens count: sentence-transformers computes them with padding and, where flash-attn is installed, without.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import NEEDS_CUDA, Report, run_part, seconds_of
from stage_trainer.plan.devices import peak_flops
from stage_trainer.plan.flops import StepShape, text_flops, vision_flops
from text_tower import PackedTokens, TextTower, TextTowerConfig
from torch import nn
from vision_tower import PackedPatches, VisionTower, VisionTowerConfig, patch_keep_indices

PAD = 1
Contender = tuple[Callable[[], nn.Module], Callable[[Any], torch.Tensor]]
"""Makes a model, and embeds with it."""


def measure(report: Report) -> None:
    for longest in (77, 512) if report.cuda else (16,):
        beside_sentence_transformers(report, longest)
    beside_timm(report)


def beside_timm(report: Report) -> None:
    config, size = VisionTowerConfig.eva02_large(224), 128
    if not report.cuda:
        config, size = replace(config, layers=2, width=64, heads=2, mlp_width=170, resolution=56), 4
    with report.device:
        tower = VisionTower(config)
    rows, columns = config.grid
    images = torch.randn(size, 3, rows * config.patch, columns * config.patch, device=report.device)
    keep = patch_keep_indices(torch.arange(size, device=report.device), config.num_patches, 0.5)
    sizes = [(2 * rows, columns // 2), (columns // 2, 2 * rows)] * (size // 2)
    pages = PackedPatches.from_images(
        [torch.randn(3, h * config.patch, w * config.patch, device=report.device) for h, w in sizes], config.patch
    )
    contenders: dict[str, Contender] = {
        "timm, eager": (partial(timms, tower), lambda model: model(images)),
        "timm, compiled": (partial(compiled_timms, tower), lambda model: model(images)),
    }
    for name, settings in ways("sdpa", "xformers", "flash-attn").items():
        contenders[name] = partial(configured, tower, **settings), lambda model: model(images)
        if name == "ours, eager, sdpa":  # compiled it is in the part `step`
            half = partial(configured, tower, **settings), lambda model: model(images, keep=keep)
            contenders[f"{name}, patch dropout 0.5"] = half
    contenders["ours, eager, sdpa, packed pages"] = partial(configured, tower), lambda model: model(pages)

    found: dict[str, Any] = {}
    for name, (make, run) in contenders.items():
        kept = keep.shape[1] if "dropout" in name else config.num_patches
        work = vision_flops(config, StepShape(images=size, kept_patches=kept)).model
        found[name] = one(report, name, (make, run), {"images": size}, work)
        report.note("images", found)


def beside_sentence_transformers(report: Report, longest: int) -> None:
    config, texts = TextTowerConfig(vocab_size=8192), max(4, 65536 // longest)
    if not report.cuda:
        config, texts = replace(config, vocab_size=128, width=64, layers=2, heads=2, mlp_width=128), 8
    with report.device:
        tower = TextTower(config)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, longest + 1, (texts,), generator=generator).tolist()
    ids = [torch.randint(4, config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    packed = PackedTokens.from_lists(ids).to(report.device)
    with tempfile.TemporaryDirectory() as folder:
        tower.save_pretrained(Path(folder) / "model")
        theirs = {
            name: partial(sentence_transformers, Path(folder) / "model", attention, unpadded)
            for name, attention, unpadded in (
                ("sentence-transformers, padded, sdpa", "sdpa", False),
                ("sentence-transformers, padded, flash-attn", "flash_attention_2", False),
                ("sentence-transformers, unpadded", "flash_attention_2", True),
            )
        }
        contenders: dict[str, Contender] = {
            name: (make, partial(their_embeddings, features_of(ids, unpadded="unpadded" in name), report.device))
            for name, make in theirs.items()
        }
        for name, settings in ways("auto").items():
            contenders[name] = partial(configured, tower, **settings), lambda model: model(packed)
        found: dict[str, Any] = {}
        shape = StepShape(texts=texts, tokens=sum(lengths), squared_tokens=sum(n * n for n in lengths))
        counted = {"texts": texts, "tokens": sum(lengths), "padded_tokens": texts * max(lengths)}
        for name, (make, run) in contenders.items():
            found[name] = one(report, name, (make, run), counted, text_flops(config, shape).model)
            report.note(f"texts of up to {longest} tokens", found)


def ways(*backends: str) -> dict[str, dict[str, Any]]:
    return {
        f"ours, {'compiled' if compiled else 'eager'}, {backend}": {"attention": backend, "compile": compiled}
        for backend in backends
        for compiled in (False, True)
    }


def one(report: Report, name: str, contender: Contender, counted: dict[str, int], work: int) -> Any:
    """Time, work a second and MFU of one contender; or why it is not there."""

    make, run = contender

    def figures() -> dict[str, Any]:
        model = make().to(report.device).train()
        took = seconds_of(partial(step, model, run, report.device), report.device, 5 if report.cuda else 1, warm=1)
        peak = peak_flops(report.device, "bf16")
        utilisation = work / took["seconds"] / peak if peak else NEEDS_CUDA if not report.cuda else "no known peak"
        unit = "tokens" if "tokens" in counted else "images"
        rate = {f"{unit}_per_second": counted[unit] / took["seconds"]}
        return {**counted, **took, **rate, "mfu": utilisation}

    return report.tried(name, figures, absent=(ImportError, ValueError))  # as an attention library says it


def step(model: nn.Module, run: Callable[[Any], torch.Tensor], device: torch.device) -> None:
    with torch.autocast(device.type, torch.bfloat16):
        embeddings = run(model)
    embeddings.float().square().mean().backward()
    model.zero_grad()


def configured(tower: VisionTower | TextTower, **settings: Any) -> VisionTower | TextTower:
    other = copy.deepcopy(tower)
    other.configure(**settings)
    return other


def timms(tower: VisionTower) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model("eva02_large_patch14_clip_224", **tower.config.timm_arguments())
    model.load_state_dict(tower.state_dict())
    return model.to(tower.pos_embed.device)


def compiled_timms(tower: VisionTower) -> nn.Module:
    """Block by block, as ours; the whole model at once takes longer to compile than this part may."""
    model: Any = timms(tower)
    for block in model.blocks:
        block.compile()
    whole: nn.Module = model
    return whole


def sentence_transformers(folder: Path, attention: str, unpadded: bool) -> nn.Module:
    """Its Transformer and Pooling modules over transformers' model with the tower's weights."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    if attention == "flash_attention_2" and not torch.cuda.is_available():
        raise ValueError(NEEDS_CUDA)
    settings = {"add_pooling_layer": False, "attn_implementation": attention}
    transformer = Transformer(str(folder), model_kwargs=settings, unpad_inputs=unpadded)
    if unpadded and not transformer.can_flatten_inputs:
        raise ValueError("sentence-transformers pads here: it needs flash-attn to leave padding out")
    width = transformer.model.config.hidden_size
    return SentenceTransformer(modules=[transformer, Pooling(width, "mean")], device="cpu")


def features_of(ids: list[list[int]], *, unpadded: bool) -> Callable[[Any], dict[str, Any]]:
    """What its collator makes of the texts."""

    def padded(model: Any) -> dict[str, Any]:
        rows = nn.utils.rnn.pad_sequence([torch.tensor(each) for each in ids], batch_first=True, padding_value=PAD)
        return {"input_ids": rows, "attention_mask": (rows != PAD).long()}

    def flat(model: Any) -> dict[str, Any]:
        features = dict(model[0].data_collator([{"input_ids": each} for each in ids]))
        features["position_ids"] = features["position_ids"] + model[0]._flatten_position_offset
        return features

    return flat if unpadded else padded


def their_embeddings(make: Callable[[Any], dict[str, Any]], device: torch.device, model: Any) -> torch.Tensor:
    if not hasattr(model, "gpu_features"):
        found = make(model)
        model.gpu_features = {k: v.to(device) if torch.is_tensor(v) else v for k, v in found.items()}
    embeddings: torch.Tensor = model({**model.gpu_features, "modality": "text"})["sentence_embedding"]
    return embeddings


if __name__ == "__main__":
    run_part(measure)
