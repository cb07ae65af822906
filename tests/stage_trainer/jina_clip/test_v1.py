"""A directory in the layout of the published jina-clip-v1, read, written, held to its arithmetic as written here."""

import json
import math

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from bert_words import SPECIAL, word_piece
from PIL import Image
from published_eva import image_half
from safetensors.torch import load_file, save_file
from stage_trainer import DualEncoder
from stage_trainer.cli import main
from stage_trainer.errors import UserError
from stage_trainer.formats import jina_clip, jina_clip_v1
from stage_trainer.formats.history import licence_of
from stage_trainer.formats.jina_clip_v1_layout import tensors
from text_tower import TextTower, TextTowerConfig, Tokenizer
from vision_tower import VisionTower, VisionTowerConfig

CODE = "jinaai/jina-clip-implementation--"
FULL = {"hidden": 768, "ff": 3072, "vocab": 30528, "layers": 12, "grid": 14, "patch": 16}
SMALL = {"hidden": 32, "ff": 40, "vocab": 48, "layers": 2, "grid": 4, "patch": 16}
JINA_BERT = {"positions": "alibi", "mlp": "geglu", "token_types": 2, "pad_id": 0, "layer_norm_eps": 1e-12}
TEXTS = ["a dog", "The dogs, running, and the cafe", "e", "x " * 600, "中"]


def published_table(hidden, ff, vocab, layers, grid, patch):
    """{name: shape} of every tensor."""
    shapes = {"logit_scale": []}

    def norm(name, width=hidden):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = [width]

    text = "text_model.transformer."
    shapes[text + "embeddings.word_embeddings.weight"] = [vocab, hidden]
    shapes[text + "embeddings.token_type_embeddings.weight"] = [2, hidden]
    norm(text + "emb_ln")
    for i in range(layers):
        layer = f"{text}encoder.layers.{i}."
        shapes |= {f"{layer}mixer.Wqkv.weight": [3 * hidden, hidden], f"{layer}mixer.Wqkv.bias": [3 * hidden],
                   f"{layer}mixer.out_proj.weight": [hidden, hidden], f"{layer}mixer.out_proj.bias": [hidden],
                   f"{layer}mlp.gated_layers.weight": [2 * ff, hidden], f"{layer}mlp.wo.weight": [hidden, ff],
                   f"{layer}mlp.wo.bias": [hidden]}  # fmt: skip
        norm(layer + "norm1")
        norm(layer + "norm2")
    return shapes | image_half(hidden, layers, grid, patch)


def published_config(small=True):
    """config.json; a small one states in the options what is not jina-bert-flash-implementation's."""
    options = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
               "intermediate_size": 40}  # fmt: skip
    width, layers, pixels = (32, 2, 64) if small else (768, 12, 224)
    return {
        "add_projections": False, "architectures": ["JinaCLIPModel"],
        "auto_map": {"AutoConfig": f"{CODE}configuration_clip.JinaCLIPConfig",
                     "AutoModel": f"{CODE}modeling_clip.JinaCLIPModel"},
        "initializer_factor": 1.0, "logit_scale_init_value": 2.6592, "model_type": "jina_clip",
        "projection_dim": width,
        "text_config": {
            "embed_dim": width, "hf_model_config_kwargs": {"use_flash_attn": False, **(options if small else {})},
            "hf_model_name_or_path": "jinaai/jina-bert-flash-implementation", "model_type": "jina_clip_text",
            "pooler_type": "mean_pooler", "proj_bias": False, "proj_type": None,
        },
        "torch_dtype": "float32", "use_text_flash_attn": None, "use_vision_xformers": None,
        "vision_config": {
            "embed_dim": width, "fused_layer_norm": False, "head_width": 16 if small else 64, "image_size": pixels,
            "intp_freq": False, "layers": layers, "ls_init_value": None, "mlp_ratio": 2.6667,
            "model_type": "jina_clip_vision", "naive_swiglu": True, "patch_dropout": 0.1, "patch_size": 16,
            "post_norm": False, "proj_type": None, "pt_hw_seq_len": pixels // 16, "qkv_bias": True,
            "rope_embeddings": True, "subln": True, "width": width, "x_attention": True,
        },
    }  # fmt: skip


FILES = {
    "preprocessor_config.json": {
        "auto_map": {"AutoImageProcessor": f"{CODE}processing_clip.JinaCLIPImageProcessor",
                     "AutoProcessor": f"{CODE}processing_clip.JinaCLIPProcessor"},
        "fill_color": 0, "image_processor_type": "JinaCLIPImageProcessor", "interpolation": "bicubic",
        "mean": [0.48145466, 0.4578275, 0.40821073], "processor_class": "JinaCLIPProcessor",
        "resize_mode": "shortest", "size": 64, "std": [0.26862954, 0.26130258, 0.27577711],
    },
    "modules.json": [
        {"idx": 0, "name": "transformer", "path": "", "type": "custom_st.Transformer"},
        {"idx": 2, "name": "normalizer", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "config_sentence_transformers.json": {
        "__version__": {"sentence_transformers": "3.3.0", "transformers": "4.46.2", "pytorch": "2.2.2"},
        "prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine",
    },
    "special_tokens_map.json": SPECIAL,
    "tokenizer_config.json": {**SPECIAL, "do_lower_case": True, "model_max_length": 8192, "strip_accents": None,
                              "tokenize_chinese_chars": True, "tokenizer_class": "BertTokenizer"},
}  # fmt: skip


WORDS = ["##s", "##ing", "the", "dog", "run", "cafe", "##e", "##a", ",", ".", "!", "##n", "and", "red"]


@pytest.fixture
def v1(tmp_path):
    """A small directory in the published layout, with random weights in float32."""
    folder = tmp_path / "v1"
    folder.mkdir()
    generator, weights = torch.Generator().manual_seed(7), {}
    for name, shape in published_table(**SMALL).items():
        of_norm = ("norm" in name or "_ln" in name) and name.endswith(".weight")
        weights[name] = torch.randn(shape, generator=generator) * 0.25 + float(of_norm)
    weights["logit_scale"] = torch.tensor(4.25)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for name, content in {**FILES, "config.json": published_config()}.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    word_piece(WORDS).save(str(folder / "tokenizer.json"))
    return folder


class Published:
    """encode_text and encode_image of the published code, for one directory."""

    def __init__(self, folder):
        self.w = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        self.config = json.loads((folder / "config.json").read_text())
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def norm(self, x, name, eps):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps)

    def linear(self, x, name):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def encode_text(self, texts):
        self.tokenizer.enable_truncation(512)
        self.tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
        ids = torch.tensor([found.ids for found in self.tokenizer.encode_batch(texts)])
        options, text, keep = self.config["text_config"]["hf_model_config_kwargs"], "text_model.transformer.", ids != 0
        heads = options["num_attention_heads"]
        x = F.embedding(ids, self.w[text + "embeddings.word_embeddings.weight"])
        x = self.norm(x + self.w[text + "embeddings.token_type_embeddings.weight"][0], text + "emb_ln", 1e-12)
        places = torch.arange(ids.shape[1])
        slopes = torch.tensor([2.0 ** (-8 * (i + 1) / heads) for i in range(heads)])  # of a power of two
        bias = -slopes[:, None, None] * (places[:, None] - places).abs()
        for i in range(options["num_hidden_layers"]):
            layer = f"{text}encoder.layers.{i}."
            qkv = self.linear(x, layer + "mixer.Wqkv").unflatten(-1, (3, heads, -1))
            q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
            scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias).masked_fill(~keep[:, None, None], -1e9)
            mixed = self.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), layer + "mixer.out_proj")
            x = self.norm(x + mixed, layer + "norm1", 1e-12)
            gate, value = self.linear(x, layer + "mlp.gated_layers").chunk(2, -1)
            x = self.norm(x + self.linear(F.gelu(gate) * value, layer + "mlp.wo"), layer + "norm2", 1e-12)
        return F.normalize((x * keep[..., None]).sum(1) / keep.sum(1, keepdim=True), dim=-1)

    def encode_image(self, images):
        from torchvision import transforms

        colours = (FILES["preprocessor_config.json"][key] for key in ("mean", "std"))
        steps = [transforms.Resize(64, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(64),
                 transforms.ToTensor(), transforms.Normalize(*colours)]  # fmt: skip
        w, vision = self.w, self.config["vision_config"]
        x = torch.stack([transforms.Compose(steps)(image) for image in images])
        x = F.conv2d(x, w["vision_model.patch_embed.proj.weight"], w["vision_model.patch_embed.proj.bias"], stride=16)
        grid, d = x.shape[-1], vision["head_width"]
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([w["vision_model.cls_token"].expand(len(x), -1, -1), x], dim=1) + w["vision_model.pos_embed"]
        frequencies = 10000 ** (-torch.arange(0, d // 2, 2) / (d // 2))
        angles = (torch.arange(grid)[:, None] * frequencies).repeat_interleave(2, dim=-1)  # 0 to 13, as they are
        angles = torch.cat([angles[:, None].expand(grid, grid, d // 2), angles[None].expand(grid, grid, d // 2)], -1)
        cos, sin = angles.flatten(0, 1).cos(), angles.flatten(0, 1).sin()

        def turned(y):
            patches = y[:, :, 1:]
            swapped = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
            return torch.cat([y[:, :, :1], patches * cos + swapped * sin], dim=2)

        for i in range(vision["layers"]):
            block = f"vision_model.blocks.{i}."
            y, attn = self.norm(x, block + "norm1", 1e-6), block + "attn."
            q = F.linear(y, w[attn + "q_proj.weight"], w[attn + "q_bias"])
            k = F.linear(y, w[attn + "k_proj.weight"])
            v = F.linear(y, w[attn + "v_proj.weight"], w[attn + "v_bias"])
            q, k, v = (t.unflatten(-1, (-1, d)).transpose(1, 2) for t in (q, k, v))
            mixed = (turned(q) @ turned(k).transpose(-1, -2) / math.sqrt(d)).softmax(-1) @ v
            mixed = self.norm(mixed.transpose(1, 2).flatten(2), attn + "inner_attn_ln", 1e-6)
            x = x + self.linear(mixed, attn + "proj")
            y = self.norm(x, block + "norm2", 1e-6)
            gated = F.silu(self.linear(y, block + "mlp.w1")) * self.linear(y, block + "mlp.w2")
            x = x + self.linear(self.norm(gated, block + "mlp.ffn_ln", 1e-6), block + "mlp.w3")
        return F.normalize(self.norm(x, "vision_model.norm", 1e-6)[:, 0], dim=-1)


def pictures():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in ((64, 64), (90, 70))]


def test_the_full_model_has_the_395_published_names_shapes_and_bytes():
    text = TextTowerConfig(vocab_size=30528, width=768, layers=12, heads=12, mlp_width=3072, **JINA_BERT)
    with torch.device("meta"):
        vision = VisionTower(VisionTowerConfig.eva02_base(reference_grid=None))
        found = tensors(TextTower(text), vision, torch.empty(1))
    assert {name: list(tensor.shape) for name, tensor in found.items()} == published_table(**FULL)
    assert len(found) == 395
    assert sum(tensor.numel() for tensor in found.values()) == 222_647_041
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in sorted(found.items()):
        end = offset + tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    assert 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8 + offset == 890_633_308


def test_a_full_size_config_is_the_published_one():
    text = TextTowerConfig(vocab_size=30528, width=768, layers=12, heads=12, mlp_width=3072, **JINA_BERT)
    with torch.device("meta"):
        towers = TextTower(text), VisionTower(VisionTowerConfig.eva02_base(reference_grid=None))
    model = DualEncoder(*towers)
    assert jina_clip_v1.config_json(model, model.text, "", "float32") == published_config(small=False)


def test_text_image_and_temperature_are_the_published_ones(v1):
    model, theirs = DualEncoder.from_pretrained(v1), Published(v1)
    torch.testing.assert_close(torch.from_numpy(model.encode_text(TEXTS)), theirs.encode_text(TEXTS), rtol=0, atol=1e-5)
    found = torch.from_numpy(model.encode_image(pictures()))
    torch.testing.assert_close(found, theirs.encode_image(pictures()), rtol=0, atol=1e-5)
    assert model.logit_scale.item() == model.text_logit_scale.item() == 4.25
    assert model.matryoshka_dims is None
    assert model.text.config == TextTowerConfig(vocab_size=48, width=32, layers=2, heads=2, mlp_width=40, **JINA_BERT)
    assert (model.vision.config.reference_grid, model.vision.config.grid) == (None, (4, 4))


def test_published_to_ours_to_published_is_the_same_to_the_byte(v1, tmp_path):
    DualEncoder.from_pretrained(v1).save_pretrained(tmp_path / "ours")
    written = jina_clip_v1.write(DualEncoder.from_pretrained(tmp_path / "ours"), tmp_path / "again")
    assert written == (None, (), ())
    assert {file.name for file in v1.iterdir()} == {file.name for file in (tmp_path / "again").iterdir()}
    for file in v1.iterdir():
        again = tmp_path / "again" / file.name
        if file.suffix == ".safetensors" or file.name.startswith(("tokenizer", "special")):
            assert file.read_bytes() == again.read_bytes(), file.name
        else:
            assert json.loads(file.read_text()) == json.loads(again.read_text()), file.name


@pytest.fixture
def model(v1):
    """One of ours: nothing of it at a default that the layout has a place for, or we have."""
    torch.manual_seed(0)
    text = {"vocab_size": 48, "width": 32, "layers": 1, "heads": 4, "mlp_width": 24, **JINA_BERT, "token_types": 3,
            "layer_norm_eps": 1e-5, "max_length": 300, "dropout": 0.1, "truncate_dim": 8, "checkpointing": True,
            "instructions": {"query": "the query: "}}  # fmt: skip
    vision = {"resolution": 32, "patch": 8, "width": 32, "layers": 1, "heads": 2, "mlp_width": 50,
              "reference_grid": None, "checkpointing": True}  # fmt: skip
    towers = TextTower(TextTowerConfig(**text), Tokenizer.from_file(v1)), VisionTower(VisionTowerConfig(**vision))
    made = DualEncoder(*towers, matryoshka_dims=(32, 8))
    with torch.no_grad():
        made.text_logit_scale.add_(1)
    return made


def test_ours_to_published_to_ours_is_the_same_to_the_bit(model, tmp_path):
    jina_clip_v1.write(model, tmp_path / "out")
    back = DualEncoder.from_pretrained(tmp_path / "out")
    assert (back.text.config, back.vision.config) == (model.text.config, model.vision.config)
    assert back.matryoshka_dims == (32, 8)
    torch.testing.assert_close(dict(back.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


LAYER = "text_model.transformer.encoder.layers.0."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update({"text_model.transformer.pooler.dense.bias": torch.ones(2)}), "pooler.dense.bias, which jina-clip-v1 does not"),  # noqa: E501
        (lambda w: w.update({f"{LAYER}mlp.gated_layers.bias": torch.ones(80)}), "unexpected: .*gated_layers.bias"),
        (lambda w: w.update({"vision_model.rope.freqs_cos": torch.ones(9)}), "have vision_model.rope.freqs_cos"),
        (lambda w: w.pop(f"{LAYER}mlp.wo.bias"), "missing: .*mlp.wo.bias"),
        (lambda w: w.update({f"{LAYER}mlp.wo.bias": torch.ones(3)}), r"wo.bias \[3\], expected \[32\]"),
        (lambda w: w.update(logit_scale=torch.ones(1)), r"but one of shape \[1\]"),
    ],
)  # fmt: skip
def test_weights_that_are_not_the_layouts_are_refused_by_name(v1, change, message):
    weights = load_file(v1 / "model.safetensors")
    change(weights)
    save_file(weights, v1 / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        DualEncoder.from_pretrained(v1)


@pytest.mark.parametrize(
    ("place", "key", "value", "message"),
    [
        ((), "trilith_clip", {"text": {"adapters": []}}, "trilith_clip.text has adapters"),
        ((), "gamma", 2, "gamma 2"),
        (("text_config",), "hf_model_name_or_path", "jinaai/jina-embeddings-v3", "hf_model_name_or_path"),
        (("text_config",), "pooler_type", "cls_pooler", "pooler_type 'cls_pooler'"),
        (("text_config",), "embed_dim", 64, "embed_dim 64, but the weights are 32 wide"),
        (("text_config", "hf_model_config_kwargs"), "mlp_type", "mlp", "mlp_type 'mlp'"),
        (("text_config", "hf_model_config_kwargs"), "use_qk_norm", True, "use_qk_norm True"),
        (("text_config", "hf_model_config_kwargs"), "lora_rank", 4, "hf_model_config_kwargs.lora_rank 4"),
        (
            ("text_config", "hf_model_config_kwargs"),
            "intermediate_size",
            41,
            "intermediate_size 41, but the weights 40",
        ),
        (("vision_config",), "pt_hw_seq_len", 16, "pt_hw_seq_len is 16 and intp_freq False, which fits no"),
    ],
)
def test_keys_that_are_not_the_layouts_are_refused_by_name(v1, place, key, value, message):
    file = v1 / "config.json"
    inner = config = json.loads(file.read_text())
    for step in place:
        inner = inner[step]
    inner[key] = value
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        DualEncoder.from_pretrained(v1)


def test_what_a_model_is_that_the_layout_is_not_is_refused_by_name(model, v1, tmp_path):
    rotary = DualEncoder(
        TextTower(TextTowerConfig(vocab_size=48, width=32, layers=1, heads=2, mlp_width=8)), model.vision
    )
    with pytest.raises(UserError, match="rotary XLM-RoBERTa, and jina-clip-v1's is JinaBERT; use --format jina-clip"):
        jina_clip_v1.write(rotary, tmp_path / "out")
    rescaled = VisionTower(VisionTowerConfig(resolution=32, patch=8, width=32, layers=1, heads=2))
    with pytest.raises(UserError, match="has reference_grid 16, and jina-clip-v1's rotary positions are those"):
        jina_clip_v1.write(DualEncoder(model.text, rescaled), tmp_path / "out")
    for form in ("jina-clip", "common", "open-clip"):
        model.save_pretrained(tmp_path / form)
        assert main(["export", str(tmp_path / form), str(tmp_path / "out"), "--format", form]) == 2
    with pytest.raises(
        UserError, match="JinaBERT .*which transformers, .* do not have; use --format jina-clip-v1, or onnx"
    ):
        jina_clip.write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_are_merged_by_the_command_and_the_card_says_what_it_is(model, tmp_path, capsys):
    text = TextTower(
        TextTowerConfig(**{**vars(model.text.config), "adapters": ("a", "b"), "lora_rank": 2}), model.text.tokenizer
    )
    for parameter in text.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    adapted = DualEncoder(text, model.vision)
    adapted.save_pretrained(tmp_path / "ours")
    with pytest.raises(UserError, match="jina-clip-v1's layout has no adapters; with --lora merged a is added"):
        jina_clip_v1.write(adapted, tmp_path / "kept", lora="kept")
    main(["export", str(tmp_path / "ours"), str(tmp_path / "out"), "--format", "jina-clip-v1"])
    assert "the adapter a is merged into the text tower's weights" in capsys.readouterr().out
    back = DualEncoder.from_pretrained(tmp_path / "out")
    assert np.abs(back.encode_text(TEXTS) - adapted.encode_text(TEXTS)).max() < 1e-5
    card = (tmp_path / "out/README.md").read_text()
    assert "JinaBERT with ALiBi" in card
    assert "the layout of jina-clip-v1" in card


def test_the_published_licence_is_not_v2s(v1, recwarn):
    DualEncoder.from_pretrained(v1)
    assert not [warning for warning in recwarn if "CC-BY-NC" in str(warning.message)]
    assert licence_of(str(v1)) == licence_of("jinaai/jina-clip-v1") == "apache-2.0"
    assert licence_of("jinaai/jina-clip-v2") == licence_of("jinaai/jina-embeddings-v3") == "cc-by-nc-4.0"
