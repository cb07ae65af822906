"""A model's folder holds whatever others wrote: it is read, or it is one message that names the folder.

Every value of every JSON file is replaced by what it should not be, every file cut off or given another header. The
everyday tests try what once ended in a traceback, a hang or a file outside of the folder; the full ones try everything.
"""

import copy
import io
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.formats import jina_clip, jina_clip_v1, open_clip
from text_tower import MaskedLM, TextTower, TextTowerConfig, Tokenizer
from vision_tower import VisionTower, VisionTowerConfig

WRONG = [None, [], "4", "../../x", -1, 0, 10**30, 10**400, 5e-324, True, [None], {"a": 1}, {"content": 3}, ...]
NO_JSON = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"NaN",
    b'{"a": NaN}',
    b"\xff\xfe",
    b'{"a": "\\ud800"}',
    b"[" * 100_000,
    b"1" * 6000,
]
REMOVED = ...


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    words = [f"{a}{b} {b}{c}{a}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrst"]
    SentencePieceTrainer.train(sentence_iterator=iter(words), model_writer=model, vocab_size=40, minloglevel=2)
    file = tmp_path_factory.mktemp("spm") / "sentencepiece.bpe.model"
    file.write_bytes(model.getvalue())
    return Tokenizer.from_file(file)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Tokenizer:
    """A WordPiece tokenizer with every file that is read beside it."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "##a", "##b", "the"]
    built = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    built.normalizer = tokenizers.normalizers.BertNormalizer()
    built.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    built.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    built.add_special_tokens(vocabulary[:5])
    out = tmp_path_factory.mktemp("words")
    built.save(str(out / "tokenizer.json"))
    (out / "vocab.txt").write_text("\n".join(vocabulary))
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": {"content": "[MASK]", "lstrip": False}}
    decoder = {"added_tokens_decoder": {str(i): {"content": word} for i, word in enumerate(vocabulary[:5])}}
    settings = {**names, **decoder, "do_lower_case": True, "tokenizer_class": "BertTokenizer", "model_max_length": 64}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.from_file(out)


@pytest.fixture
def folder(tokenizer, words, tmp_path) -> Callable[[str], tuple[Path, Callable[[Path], object]]]:
    """A good folder in one of the layouts that are read, and what reads it."""
    jina_bert = {"positions": "alibi", "mlp": "geglu", "token_types": 2, "pad_id": 0}
    small = {"vocab_size": 42, "width": 16, "layers": 1, "heads": 2, "mlp_width": 16, "max_length": 64}
    adapters = {"lora_rank": 2, "lora_alpha": 3.0, "adapters": ("query", "other"), "instructions": {"query": "q: "}}

    def text(path: Path, layout: str) -> None:
        bare = {"projector": {"projector": 8, "projector_hidden": 12}}
        bare |= {name: {} for name in ("plain", "masked", "st", "index")}
        tower = TextTower(TextTowerConfig(**small, **bare.get(layout, adapters)))
        tower.tokenizer = tokenizer
        if layout == "masked":
            MaskedLM(tower).save_pretrained(path)
        else:
            names = {"peft": "peft", "remote": "remote-code", "clip": "remote-code"}
            tower.save_pretrained(path, layout=names.get(layout, "transformers"))
        if layout == "clip":
            weights = load_file(path / "model.safetensors")
            half = {f"text_model.transformer.{name.removeprefix('roberta.')}": t for name, t in weights.items()}
            save_file(half, path / "model.safetensors")
            options = {"lora_adaptations": ["query", "other"], "lora_rank": 2, "lora_alpha": 3, "rotary_emb_base": 5.0}
            options["task_instructions"] = {"query": "q: "}
            config = {"model_type": "jina_clip", "text_config": {"hf_model_config_kwargs": options}}
            (path / "config.json").write_text(json.dumps(config))
        if layout == "st":
            names = ["Transformer", "Pooling", "Normalize"]
            paths = ["", "1_Pooling", "2_Normalize"]
            modules = [
                {"idx": i, "name": str(i), "path": at, "type": f"sentence_transformers.models.{name}"}
                for i, (name, at) in enumerate(zip(names, paths, strict=True))
            ]
            prompts = {"prompts": {"q": "query: "}, "default_prompt_name": None, "truncate_dim": 8}
            (path / "1_Pooling").mkdir(exist_ok=True)
            for name, content in {
                "modules.json": modules,
                "1_Pooling/config.json": {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True},
                "config_sentence_transformers.json": prompts,
                "sentence_bert_config.json": {"max_seq_length": 32, "do_lower_case": False},
                "special_tokens_map.json": {"bos_token": "<s>", "mask_token": {"content": "<mask>", "lstrip": True}},
                "added_tokens.json": {"<mask>": 41},
            }.items():
                (path / name).write_text(json.dumps(content))
        if layout == "index":
            (path / "model.safetensors").rename(path / "a.safetensors")
            places = dict.fromkeys(load_file(path / "a.safetensors"), "a.safetensors")
            (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    def vision(path: Path, layout: str) -> None:
        added = {"projector": 8} if layout == "apart" else {}
        tower = VisionTower(
            VisionTowerConfig(resolution=16, patch=8, width=16, layers=1, heads=2, mlp_width=24, **added)
        )
        tower.save_pretrained(path, apart=True)
        values = json.loads((path / "config.json").read_text())
        if layout == "timm":
            keys = ("architecture", "num_classes", "model_args", "pretrained_cfg")
            (path / "config.json").write_text(json.dumps({key: values[key] for key in keys}))
        if layout == "jina":
            half = {f"vision_model.{name}": t for name, t in load_file(path / "model.safetensors").items()}
            save_file(half, path / "model.safetensors")
            shape = {"width": 16, "layers": 1, "patch_size": 8, "image_size": 16, "head_width": 8, "embed_dim": 16}
            shape |= {"intp_freq": True, "pt_hw_seq_len": 16, "subln": True, "mlp_ratio": 1.5}
            shape |= {"rope_embeddings": True, "naive_swiglu": True}
            (path / "config.json").write_text(json.dumps({"model_type": "jina_clip", "vision_config": shape}))
            sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "rescale_factor": 1 / 255}
            kernel = {"resample": 3, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
            (path / "preprocessor_config.json").write_text(json.dumps({**sizes, **kernel}))

    def make(layout: str) -> tuple[Path, Callable[[Path], object]]:
        path = tmp_path / "outer" / layout
        if layout == "dual":
            text(tmp_path / "text", "plain")
            vision(tmp_path / "vision", "own")
            towers = TextTower.from_pretrained(tmp_path / "text"), VisionTower.from_pretrained(tmp_path / "vision")
            DualEncoder(*towers, matryoshka_dims=(8, 16)).save_pretrained(path)
            return path, DualEncoder.from_pretrained
        if layout == "whole":  # jina-clip-v2's, both halves in one file
            config = TextTowerConfig(**small, lora_rank=2, adapters=("query",), instructions={"query": "q: "})
            image = VisionTower(VisionTowerConfig(resolution=16, patch=8, width=16, layers=1, heads=2, mlp_width=24))
            jina_clip.write(DualEncoder(TextTower(config, tokenizer), image, matryoshka_dims=(8, 16)), path)
            file = path / "config.json"
            said = {"text": {"dropout": 0.1}, "vision": {"checkpointing": True}, "text_logit_scale": 1.0}
            file.write_text(json.dumps({**json.loads(file.read_text()), "trilith_clip": said}))
            return path, DualEncoder.from_pretrained
        if layout in ("jina-bert", "whole v1"):
            config = TextTowerConfig(**{**small, **jina_bert, "vocab_size": 16})
            tower = TextTower(config, words)
            if layout == "jina-bert":
                tower.save_pretrained(path)
                return path, TextTower.from_pretrained
            image = VisionTowerConfig(resolution=16, patch=8, width=16, layers=1, heads=2, reference_grid=None)
            jina_clip_v1.write(DualEncoder(tower, VisionTower(image)), path)
            file = path / "config.json"
            said = {"text": {"dropout": 0.1}, "vision": {"checkpointing": True}, "text_logit_scale": 1.0}
            file.write_text(json.dumps({**json.loads(file.read_text()), "trilith_clip": said}))
            return path, DualEncoder.from_pretrained
        if layout == "open-clip":
            image = VisionTower(VisionTowerConfig(resolution=16, patch=8, width=16, layers=1, heads=2, mlp_width=24))
            model = DualEncoder(TextTower(TextTowerConfig(**small), tokenizer), image, matryoshka_dims=(8, 16))
            open_clip.write(model, path, None, lambda _: "")
            return path, DualEncoder.from_pretrained
        if layout in ("own", "apart", "timm", "jina"):
            vision(path, layout)
            return path, lambda path: VisionTower.from_pretrained(path, num_classes=0)
        text(path, layout)
        return path, MaskedLM.from_pretrained if layout == "masked" else TextTower.from_pretrained

    return make


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key in value if isinstance(value, dict) else range(min(3, len(value))) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    value = at = copy.deepcopy(value)
    for key in path[:-1]:
        at = at[key]
    if new is REMOVED:
        del at[path[-1]]
    else:
        at[path[-1]] = new
    return value


def fault_of(load: Callable[[Path], object], folder: Path) -> str | None:
    """What is wrong with how a folder was refused; None if it was read, or refused in one message."""
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(folder)
    except (ValueError, FileNotFoundError) as error:
        if isinstance(error, UnicodeError) or str(folder) not in str(error) or len(str(error)) > 20_000:
            return f"{type(error).__name__}: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "it took long" if time.process_time() - start > 20 else None


FOUND: list[tuple[str, str, tuple[Any, ...], Any]] = [
    ("lora", "config.json", ("trilith",), None),
    ("lora", "config.json", ("trilith", "adapters"), ["../../escaped", "other"]),
    ("lora", "config.json", ("trilith", "adapters"), ["query", 3]),
    ("lora", "config.json", ("trilith", "lora_rank"), 10**400),
    ("lora", "config.json", ("trilith", "lora_alpha"), 10**400),
    ("lora", "config.json", ("trilith", "checkpointing"), "yes"),
    ("lora", "config.json", ("num_hidden_layers",), 10**9),
    ("lora", "config.json", ("vocab_size",), 10**30),
    ("lora", "config.json", ("layer_norm_eps",), 10**400),
    ("peft", "query/adapter_config.json", ("r",), 10**400),
    ("peft", "query/adapter_config.json", ("lora_alpha",), 5e-324),
    ("peft", "query/adapter_config.json", ("alpha_pattern",), {"(a+)+$": 4}),
    ("peft", "query/adapter_config.json", ("rank_pattern",), {"a{99999999999}": 4}),
    ("st", "modules.json", (0, "path"), "../../x"),
    ("st", "modules.json", (1, "path"), "/etc"),
    ("st", "config_sentence_transformers.json", ("default_prompt_name",), []),
    ("st", "config_sentence_transformers.json", ("truncate_dim",), "8"),
    ("st", "special_tokens_map.json", ("bos_token",), []),
    ("st", "special_tokens_map.json", ("mask_token",), {"content": 3}),
    ("st", "added_tokens.json", ("<mask>",), "41"),
    ("st", "tokenizer_config.json", ("added_tokens_decoder",), {"0": {"content": None}}),
    ("st", "tokenizer_config.json", ("mask_token",), {"content": [1]}),
    ("index", "model.safetensors.index.json", ("weight_map",), [1]),
    ("index", "model.safetensors.index.json", ("weight_map", "emb_ln.bias"), "../../x"),
    ("index", "model.safetensors.index.json", ("weight_map", "emb_ln.bias"), [1]),
    ("clip", "config.json", ("text_config",), [1]),
    ("own", "config.json", ("trilith", "layers"), 10**9),
    ("own", "config.json", ("trilith",), [1]),
    ("own", "config.json", ("trilith", "rope_theta"), 10**400),
    ("own", "config.json", ("pretrained_cfg",), [1]),
    ("own", "config.json", ("trilith", "crop_pct"), 5e-324),
    ("own", "preprocessor_config.json", ("size", "shortest_edge"), 17),
    ("plain", "sentence_bert_config.json", ("max_seq_length",), "8"),
    ("plain", "1_Pooling/config.json", ("pooling_mode",), "cls"),
    ("plain", "config_sentence_transformers.json", ("prompts",), [1]),
    ("apart", "config.json", ("trilith", "projector"), 10**9),
    ("apart", "config.json", ("trilith", "projector"), "8"),
    ("apart", "1_Dense/config.json", ("bias",), 4),
    ("apart", "1_Dense/config.json", (), [1]),
    ("projector", "config.json", ("trilith", "projector"), 10**9),
    ("projector", "config.json", ("trilith", "projector_hidden"), "12"),
    ("projector", "modules.json", (2, "path"), "../../x"),
    ("projector", "modules.json", (3, "path"), "2_Dense"),
    ("projector", "2_Dense/config.json", ("activation_function",), [1]),
    ("projector", "2_Dense/config.json", ("in_features",), 10**400),
    ("projector", "3_Dense/config.json", ("out_features",), 10**400),
    ("projector", "3_Dense/config.json", ("out_features",), REMOVED),
    ("projector", "3_Dense/config.json", ("bias",), 4),
    ("timm", "config.json", ("architecture",), [1]),
    ("timm", "config.json", ("pretrained_cfg", "input_size"), 3),
    ("timm", "config.json", ("model_args", "depth"), 10**9),
    ("jina", "config.json", ("vision_config", "mlp_ratio"), "x"),
    ("jina", "config.json", ("vision_config", "mlp_ratio"), 1e300),
    ("jina", "preprocessor_config.json", ("resize_mode",), []),
    ("jina", "preprocessor_config.json", ("crop_size",), 1),
    ("open-clip", "open_clip_config.json", ("model_cfg", "text_cfg"), [1]),
    ("open-clip", "open_clip_config.json", ("model_cfg", "vision_cfg"), "4"),
    ("open-clip", "open_clip_config.json", ("model_cfg", "text_cfg", "context_length"), 10**400),
    ("open-clip", "config.json", ("attribute_map",), [1]),
    ("dual", "config.json", ("matryoshka_dimensions",), REMOVED),
    ("dual", "config.json", ("matryoshka_dimensions",), [None]),
    ("dual", "config.json", ("logit_scale",), "x"),
    ("dual", "config.json", ("logit_scale",), 10**400),
    ("dual", "config.json", ("text_logit_scale",), REMOVED),
]


@pytest.mark.parametrize("layout", sorted({case[0] for case in FOUND}))
def test_what_once_got_through_is_refused_in_one_message_that_names_the_folder(layout, folder):
    path, load = folder(layout)
    load(path)
    for _, name, place, new in (case for case in FOUND if case[0] == layout):
        file = path / name
        original = file.read_text()
        file.write_text(json.dumps(replaced(json.loads(original), place, new)))
        assert fault_of(load, path) is None, f"{name} {place}: {str(new)[:80]}"
        if new is not None:
            with pytest.raises(ValueError):
                load(path)
        file.write_text(original)
    assert not (path.parent.parent / "escaped").exists()


@pytest.mark.full
@pytest.mark.parametrize(
    "layout",
    [
        "plain",
        "lora",
        "peft",
        "remote",
        "clip",
        "masked",
        "projector",
        "st",
        "index",
        "own",
        "apart",
        "timm",
        "jina",
        "dual",
        "whole",
        "jina-bert",
        "whole v1",
        "open-clip",
    ],
)
def test_no_value_of_any_file_gets_past_the_message(layout, folder):
    path, load = folder(layout)
    load(path)
    faults = {}
    for file in sorted(path.rglob("*.json")):
        original = file.read_bytes()
        content = json.loads(original)
        for place in places(content):
            for new in WRONG[: None if place else -1]:
                file.write_text(json.dumps(replaced(content, place, new)))
                if fault := fault_of(load, path):
                    faults[f"{file.name} {place}: {str(new)[:40]}"] = fault
        for raw in [*NO_JSON, original[: len(original) // 2]]:
            file.write_bytes(raw)
            if fault := fault_of(load, path):
                faults[f"{file.name}: {raw[:20]!r}"] = fault
        file.write_bytes(original)
    assert not faults


@pytest.mark.parametrize("layout", ["plain", "st", "own", "dual", "whole", "whole v1", "open-clip"])
def test_no_file_of_weights_or_pieces_gets_past_the_message(layout, folder):
    path, load = folder(layout)
    faults = {}
    for file in sorted([*path.rglob("*.safetensors"), *path.rglob("*.model")]):
        raw = file.read_bytes()
        damaged = [b"", b"x", raw[:9], raw[: len(raw) // 2], raw[:-1], (2**40).to_bytes(8, "little") + raw[8:]]
        damaged += [(2**63 + 5).to_bytes(8, "little") + raw[8:], raw.replace(b'"shape":[', b'"shapX":[')]
        damaged += [raw.replace(b'"F32"', b'"%s"' % dtype.ljust(3)) for dtype in (b"I32", b"F64", b"XXX", b"U32")]
        for number, content in enumerate(damaged):
            file.write_bytes(content)
            if fault := fault_of(load, path):
                faults[f"{file.name} {number}"] = fault
        file.write_bytes(raw)
    assert not faults


class Runs:
    def __reduce__(self):
        return print, ("code of a pickle",)


def test_pickles_of_odd_tensors_are_one_message(folder, capsys):
    path, load = folder("plain")
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    some = "emb_ln.weight"
    for name, odd in {
        "runs": Runs(),
        "sparse": torch.eye(4).to_sparse(),
        "meta": torch.empty(16, device="meta"),
        "huge": torch.zeros(1).expand(2**20, 2**20),
        "whole": weights[some].to(torch.int64),
    }.items():
        torch.save({**weights, some: odd}, path / "pytorch_model.bin")
        assert fault_of(load, path) is None, name
        with pytest.raises(ValueError, match=some if name != "runs" else "only those are read"):
            load(path)
    torch.save({**weights, 3: torch.zeros(1)}, path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="expected a state dict"):
        load(path)
    assert "code of a pickle" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["../../escaped", "a/b", "..", ".", "", "a\\b", "a\0b", "a\nb", "x" * 300, "/etc", "\ud800"]
)
def test_an_adapters_name_never_leaves_the_folder_read_or_written(name, folder):
    with pytest.raises(ValueError, match="adapters has .* cannot name a folder"):
        TextTowerConfig(adapters=(name,), lora_rank=2)
    path, load = folder("peft")
    shutil.copytree(path / "query", path.parent.parent / "escaped")
    with pytest.raises(ValueError, match="cannot name a folder"):
        TextTower.from_pretrained(folder("plain")[0], peft={name: path / "query"})
    config = json.loads((path / "config.json").read_text())
    config["trilith"]["adapters"][0] = name
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json.*(cannot name a folder|not JSON of text)"):
        load(path)
