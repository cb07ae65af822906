"""`--format jina-clip` writes exactly the published layout, and nothing is lost on the way there and back."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from data_prep.shards import DatasetWriter
from safetensors.torch import load_file, safe_open
from stage_trainer import DualEncoder
from stage_trainer.build import build_model, load_tokenizer
from stage_trainer.cli import main
from stage_trainer.errors import UserError
from stage_trainer.formats import jina_clip
from stage_trainer.formats.jina_clip_layout import tensors
from stage_trainer.recipe.read import load
from text_tower import TextTower, TextTowerConfig, Tokenizer
from vision_tower import VisionTower, VisionTowerConfig

FULL = {"hidden": 1024, "ff": 4096, "vocab": 250002, "text_layers": 24, "vision_layers": 24, "grid": 36, "patch": 14}
QUERY = "retrieval.query"
TEXTS = ["a dog", "the query for a dog"]


def header_and_data(weights):
    """Bytes of a safetensors file of these tensors, from its definition: all of one dtype stand in order of names."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in sorted(weights.items()):
        assert tensor.dtype == torch.float16
        end = offset + tensor.numel() * 2
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + offset


@pytest.mark.parametrize("adapters", [(QUERY,), ()])
def test_the_full_model_has_the_999_published_names_shapes_and_bytes(table, adapters):
    lora = {"adapters": adapters, "lora_rank": 4, "lora_alpha": 4.0} if adapters else {}
    with torch.device("meta"):
        text = TextTower(TextTowerConfig(**lora))
        vision = VisionTower(VisionTowerConfig.eva02_large(512))
        found = tensors(text, vision, torch.empty(1))
    found = {name: tensor.half() for name, tensor in found.items()}
    assert {name: list(tensor.shape) for name, tensor in found.items()} == table(**FULL)
    assert len(found) == 999
    assert sum(tensor.numel() for tensor in found.values()) == 865_278_477
    assert header_and_data(found) == 1_730_688_642


def test_published_to_ours_to_published_is_the_same_to_the_byte(published, tmp_path):
    folder, _ = published
    DualEncoder.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    written = jina_clip.write(DualEncoder.from_pretrained(tmp_path / "ours"), tmp_path / "again")
    assert written == (None, (), ())
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as before, safe_open(tmp_path / "again" / file.name, "pt") as after:
                assert before.metadata() == after.metadata() == {"format": "pt"}
            assert file.stat().st_size == (tmp_path / "again" / file.name).stat().st_size
            before, after = load_file(file), load_file(tmp_path / "again" / file.name)
            assert before.keys() == after.keys()
            for name, tensor in before.items():
                assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape), name
                assert tensor.numpy().tobytes() == after[name].numpy().tobytes(), name
        elif file.name == "config.json":
            wanted = json.loads(file.read_text())
            wanted["text_config"]["hf_model_config_kwargs"]["rotary_emb_base"] = 20000.0  # stated, in any case
            assert json.loads((tmp_path / "again/config.json").read_text()) == wanted
        elif file.name.startswith(("tokenizer", "special")):
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
        else:
            assert json.loads(file.read_text()) == json.loads((tmp_path / "again" / file.name).read_text())
    # And from there to the same files, byte for byte.
    jina_clip.write(DualEncoder.from_pretrained(tmp_path / "again"), tmp_path / "third")
    names = {file.name for file in (tmp_path / "again").iterdir()}
    assert names == {file.name for file in (tmp_path / "third").iterdir()}
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "third" / name).read_bytes(), name


def test_a_full_size_config_is_the_published_one(published):
    """With the published model's settings nothing is said but what is published, and the rotary base."""
    import sys

    config = sys.modules[type(published[1]).__module__].published_config(small=False)
    text = TextTowerConfig(adapters=(QUERY,), lora_rank=4, lora_alpha=4,
                           instructions={QUERY: "Represent the query for retrieving evidence documents: "})  # fmt: skip
    with torch.device("meta"):
        towers = TextTower(text), VisionTower(VisionTowerConfig.eva02_large(512))
    model = DualEncoder(*towers, matryoshka_dims=config["matryoshka_dimensions"])
    config["text_config"]["hf_model_config_kwargs"]["rotary_emb_base"] = 20000.0
    assert jina_clip.config_json(model, towers[0], QUERY, "float16") == config


def make_model(tokenizer, *, half=False, **text):
    """A model of ours, nothing of it at a default that the published layout has a place for, or we have."""
    torch.manual_seed(0)
    text = TextTower(TextTowerConfig(**{
        "vocab_size": tokenizer.vocab_size, "width": 32, "layers": 2, "heads": 4, "mlp_width": 40, "rope_theta": 300.0,
        "max_length": 700, "layer_norm_eps": 1e-4, "dropout": 0.1, "truncate_dim": 16, "checkpointing": True, **text,
    }), tokenizer)  # fmt: skip
    vision = VisionTower(VisionTowerConfig(
        resolution=32, patch=8, width=32, layers=2, heads=2, mlp_width=50, reference_grid=None, attention_norm=False,
        mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), crop_mode="squash", interpolation="bilinear", checkpointing=True,
    ))  # fmt: skip
    model = DualEncoder(text, vision, matryoshka_dims=(32, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        model.text_logit_scale.add_(1)
        if half:
            for parameter in model.parameters():
                parameter.copy_(parameter.half().float())
    return model


@pytest.fixture
def tokenizer(published):
    return Tokenizer.from_file(published[0])


def settings(config):
    """What is not the machine's."""
    return dataclasses.replace(config, attention=type(config)().attention, compile=False)


LORA = {"adapters": (QUERY,), "lora_rank": 2, "lora_alpha": 5.0, "instructions": {QUERY: "the query: "}}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        LORA,
        {**LORA, "adapters": ("mine",)},
        {**LORA, "instructions": {}},
        {**LORA, "instructions": {QUERY: "", "other": ""}},
        {**LORA, "instructions": {"other": "an instruction alone: "}},
        {},
        {"instructions": {QUERY: "the query: ", "other": "for: "}},
    ],
)
def test_ours_to_published_to_ours_is_the_same_to_the_bit(tokenizer, tmp_path, text, half):
    model = make_model(tokenizer, half=half, **text)
    model.set_biases((-3.3, -1.5) if half else None)  # of a sigmoid loss
    jina_clip.write(model, tmp_path / "out", dtype="float16" if half else "float32")
    back = DualEncoder.from_pretrained(tmp_path / "out")
    assert back.text.config == settings(model.text.config)
    assert back.vision.config == settings(model.vision.config)
    assert (back.matryoshka_dims, back.text.tokenizer.sha256) == (model.matryoshka_dims, tokenizer.sha256)
    torch.testing.assert_close(dict(back.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert back.text_logit_scale.item() == model.text_logit_scale.item() != model.logit_scale.item()
    stored = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16 if half else torch.float32}
    assert stored["logit_scale"].shape == ()


def test_merged_adapters_are_zeros_for_the_published_code_and_gone_for_ours(tokenizer, reference, tmp_path):
    model = make_model(tokenizer, adapters=(QUERY, "other"), lora_rank=2, lora_alpha=5.0,
                       instructions={QUERY: "the query: ", "other": "for: "}, layer_norm_eps=1e-5, dropout=0.0,
                       truncate_dim=None)  # fmt: skip
    with pytest.raises(UserError, match="has the adapters retrieval.query, other, and jina-clip-v2's layout one"):
        jina_clip.write(model, tmp_path / "kept", dtype="float32")
    written = jina_clip.write(model, tmp_path / "out", lora="merged", dtype="float32")
    assert written[:2] == (QUERY, ("other",))
    stored = load_file(tmp_path / "out/model.safetensors")
    assert not any(tensor.any() for name, tensor in stored.items() if ".0.lora_" in name)
    options = json.loads((tmp_path / "out/config.json").read_text())
    assert options["trilith_clip"]["text"]["adapters"] == []
    back = DualEncoder.from_pretrained(tmp_path / "out")
    assert back.text.config.adapters == ()
    expected = model.encode_text(TEXTS)
    assert np.abs(back.encode_text(TEXTS) - expected).max() < 1e-5
    # The published arithmetic, which always applies an adapter.
    theirs = reference(tmp_path / "out").encode_text(TEXTS)
    assert np.abs(theirs.numpy() - expected).max() < 1e-5
    # An adapter that is trained from here is a new one, not the zeros, through which no gradient flows.
    again = TextTower.from_pretrained(tmp_path / "out", adapters=(QUERY,), lora_rank=4, lora_alpha=4.0)
    fresh = {name: p for name, p in again.named_parameters() if "lora_" in name}
    assert all(bool(p.any()) == ("lora_A" in name) for name, p in fresh.items())


def test_what_the_published_arithmetic_makes_of_ours_are_our_vectors(tokenizer, reference, tmp_path):
    """Of what its code has no constant for: heads, rotary base, alpha."""
    model = make_model(tokenizer, **{**LORA, "layer_norm_eps": 1e-5, "truncate_dim": None})
    jina_clip.write(model, tmp_path / "out", dtype="float32")
    theirs = reference(tmp_path / "out")
    for task in (None, QUERY):
        ours = model.encode_text(TEXTS, task=task)
        assert np.abs(theirs.encode_text(TEXTS, task).numpy() - ours).max() < 1e-5


def test_a_sentencepiece_tokenizer_becomes_a_tokenizer_json_with_the_same_ids(tmp_path):
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(["a red disk and a blue one", "ein roter Kreis"] * 9), hard_vocab_limit=False,
        model_prefix=str(tmp_path / "small"), vocab_size=40, minloglevel=2,
    )  # fmt: skip
    tokenizer = Tokenizer.from_file(tmp_path / "small.model")
    jina_clip.write(make_model(tokenizer), tmp_path / "out", dtype="float32")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in names
    assert not any(name.endswith(".model") for name in names)
    texts = ["a red one", "ein blauer Kreis", "ﬁne Ａ"]
    assert DualEncoder.from_pretrained(tmp_path / "out").text.tokenizer(texts) == tokenizer(texts)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_theta": 500.0}, "has rope_theta 500.0, and jina-clip-v2's layout knows 10000 only"),
        ({"layer_norm_eps": 1e-5}, "has layer_norm_eps 1e-05, and .* 1e-06 only"),
        ({"crop_pct": 0.9}, "has crop_pct 0.9"),
        ({"crop_mode": "border"}, "has crop_mode border, and .* center or squash only"),
        ({"interpolation": "lanczos"}, "has interpolation lanczos"),
        ({"resolution": (32, 48)}, "has resolution .32, 48., and .* a square"),
    ],
)
def test_what_the_layout_has_no_place_for_is_refused_by_name(tokenizer, tmp_path, change, words):
    model = make_model(tokenizer)
    vision = VisionTower(VisionTowerConfig(**{"resolution": 32, "patch": 8, "width": 32, "layers": 1, "heads": 2,
                                              **change}))  # fmt: skip
    with pytest.raises(UserError, match=words):
        jina_clip.write(DualEncoder(model.text, vision), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numbers_that_float16_does_not_hold_are_refused_or_said(tokenizer, tmp_path, capsys):
    model = make_model(tokenizer)
    model.save_pretrained(tmp_path / "ours")
    main(["export", str(tmp_path / "ours"), str(tmp_path / "rounded"), "--format", "jina-clip"])
    assert "tensors are rounded to float16; --dtype float32 keeps every number" in capsys.readouterr().out
    with torch.no_grad():
        model.vision.norm.weight[3] = 1e5
    with pytest.raises(UserError, match="vision_model.norm.weight has values up to 100000, which float16 does not"):
        jina_clip.write(model, tmp_path / "out")
    model.text.tokenizer = None
    with pytest.raises(UserError, match="has no tokenizer"):
        jina_clip.write(model, tmp_path / "out")


def test_export_evaluate_and_training_take_such_a_directory(published, recipes, png, tmp_path, capsys):
    folder, _ = published
    with DatasetWriter(tmp_path / "data/validation/image-short/mine", kind="image-short", source="mine") as writer:
        made = {"captions": [{"text": "a dog", "language": "en", "role": "name"}]}
        writer.write("s", {"png": png, "json": json.dumps(made).encode()}, languages=["en"], tokens=None)
    main(["evaluate", str(folder), str(tmp_path / "data"), "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())["mine"]
    assert {dim: found["en"] for dim, found in figures["recall_at_5"]["text→image"].items()} == {"64": 1.0, "32": 1.0}
    capsys.readouterr()
    main(["export", str(folder), str(tmp_path / "ours"), "--format", "trilith"])
    main(["export", str(tmp_path / "ours"), str(tmp_path / "again"), "--format", "jina-clip"])
    assert "rounded" not in capsys.readouterr().out
    assert load_file(tmp_path / "again/model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    # A recipe that starts from it, with a temperature of the text task that only our key can say.
    file = tmp_path / "again/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "trilith_clip": {"text_logit_scale": 1.5}}))
    stage = ("resolution=[[0, 48]]", "max_tokens=32", "loss.dims=[64, 32]", "model.text={}", "model.vision={}")
    recipe = load(recipes / "finetune.yaml", [*stage, f"model.weights={tmp_path / 'again'}"], stage=1).recipe
    model = build_model(recipe, 1, load_tokenizer(recipe))
    assert (model.logit_scale.item(), model.text_logit_scale.item()) == (float(torch.tensor(2.6592).half()), 1.5)
    torch.testing.assert_close(
        {n: t for n, t in model.state_dict().items() if "text_logit" not in n},
        {n: t for n, t in DualEncoder.from_pretrained(folder).state_dict().items() if "text_logit" not in n},
        rtol=0, atol=0,
    )  # fmt: skip
