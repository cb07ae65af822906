"""The published jina-clip-v2 by an implementation of our own kind of none: names, arithmetic and files as they are
published, in plain PyTorch, so that what the package reads and writes is compared with something else."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from published_eva import image_half
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

INSTRUCTION = "Represent the query for retrieving evidence documents: "
FULL = {"hidden": 1024, "ff": 4096, "vocab": 250002, "text_layers": 24, "vision_layers": 24, "grid": 36, "patch": 14}
SMALL = {"hidden": 64, "ff": 96, "vocab": 0, "text_layers": 2, "vision_layers": 2, "grid": 3, "patch": 14}
PIXELS = 48  # 3 patches of 14, and six pixels over, as 512 has eight
CODE = "jinaai/jina-clip-implementation--"


def published_table(hidden, ff, vocab, text_layers, vision_layers, grid, patch, rank=4):
    """{name: shape} of every tensor."""
    shapes = {"logit_scale": []}
    text = "text_model.transformer.roberta."

    def adapted(name, rows, columns, table=False):
        of = f"{text}{name}.parametrizations.weight."
        shapes[of + "original"] = [rows, columns]
        a, b = ([1, rows, rank], [1, rank, columns]) if table else ([1, rank, columns], [1, rows, rank])
        shapes[of + "0.lora_A"], shapes[of + "0.lora_B"] = a, b

    def norm(name, width=hidden):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = [width]

    adapted("embeddings.word_embeddings", vocab, hidden, table=True)
    adapted("embeddings.token_type_embeddings", 1, hidden, table=True)
    norm(text + "emb_ln")
    for i in range(text_layers):
        layer = f"encoder.layers.{i}."
        for name, rows, columns in (
            ("mixer.Wqkv", 3 * hidden, hidden),
            ("mixer.out_proj", hidden, hidden),
            ("mlp.fc1", ff, hidden),
            ("mlp.fc2", hidden, ff),
        ):
            adapted(layer + name, rows, columns)
            shapes[f"{text}{layer}{name}.bias"] = [rows]
        norm(f"{text}{layer}norm1")
        norm(f"{text}{layer}norm2")
    return shapes | image_half(hidden, vision_layers, grid, patch)


def published_config(small=True, **options):
    """config.json: all keys as published; a small one states in the options what is not jina-embeddings-v3's."""
    if small:
        options = {"vocab_size": SMALL_VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1,
                   "intermediate_size": 96, **options}  # fmt: skip
    width, pixels = (64, PIXELS) if small else (1024, 512)
    return {
        "add_projections": False, "architectures": ["JinaCLIPModel"],
        "auto_map": {"AutoConfig": f"{CODE}configuration_clip.JinaCLIPConfig",
                     "AutoModel": f"{CODE}modeling_clip.JinaCLIPModel"},
        "initializer_factor": 1.0, "logit_scale_init_value": 2.6592,
        "matryoshka_dimensions": [32, 64] if small else [32, 64, 128, 256, 512, 768, 1024],
        "model_type": "jina_clip", "projection_dim": width,
        "text_config": {
            "default_instruction_task": None, "default_lora_task": "retrieval.query", "embed_dim": width,
            "hf_model_config_kwargs": {
                "load_trained_adapters": False, "lora_adaptations": ["retrieval.query"], "lora_alpha": 4,
                "lora_dropout_p": 0.0, "lora_main_params_trainable": False, "lora_rank": 4,
                "task_instructions": {"retrieval.query": INSTRUCTION}, "use_flash_attn": True, **options,
            },
            "hf_model_name_or_path": "jinaai/jina-embeddings-v3", "model_type": "jina_clip_text",
            "pooler_type": "mean_pooler", "proj_bias": False, "proj_type": None,
        },
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"use_external_data_format": {"model.onnx": True}},
        "truncate_dim": None, "use_text_flash_attn": None, "use_vision_xformers": None,
        "vision_config": {
            "embed_dim": width, "fused_layer_norm": False, "head_width": 64, "image_size": pixels, "intp_freq": True,
            "layers": 2 if small else 24, "ls_init_value": None, "mlp_ratio": 2.6667, "model_type": "jina_clip_vision",
            "naive_swiglu": True, "patch_dropout": 0.1, "patch_size": 14, "post_norm": False, "proj_type": None,
            "pt_hw_seq_len": 16, "qkv_bias": True, "rope_embeddings": True, "subln": True, "width": width,
            "x_attention": True,
        },
    }  # fmt: skip


PROCESSOR = {
    "auto_map": {"AutoImageProcessor": f"{CODE}processing_clip.JinaCLIPImageProcessor",
                 "AutoProcessor": f"{CODE}processing_clip.JinaCLIPProcessor"},
    "fill_color": 0, "image_processor_type": "JinaCLIPImageProcessor", "interpolation": "bicubic",
    "mean": [0.48145466, 0.4578275, 0.40821073], "processor_class": "JinaCLIPProcessor", "resize_mode": "shortest",
    "size": PIXELS, "std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
SENTENCE_TRANSFORMERS = {
    "__version__": {"sentence_transformers": "3.3.0", "transformers": "4.46.2", "pytorch": "2.2.2"},
    "prompts": {"retrieval.query": INSTRUCTION}, "default_prompt_name": None, "similarity_fn_name": "cosine",
}  # fmt: skip
MODULES = [
    {"idx": 0, "name": "transformer", "path": "", "type": "custom_st.Transformer"},
    {"idx": 1, "name": "normalizer", "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def published_tokenizer():
    """XLM-RoBERTa's form, with letters and a few words for pieces."""
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyzREPH:.,", "▁the", "▁a", "▁query", "▁dog", "▁for", "▁Re"]
    vocabulary = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    vocabulary += [(piece, -1.0 - i / 7) for i, piece in enumerate(pieces)] + [("<mask>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return tokenizer


SMALL_VOCABULARY = published_tokenizer().get_vocab_size()
NAMED = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>", "pad_token": "<pad>",
         "sep_token": "</s>", "unk_token": "<unk>"}  # fmt: skip


def write_published(folder, *, binary=False, **options):
    """A small directory in the published layout, with random weights in float16."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name, shape in published_table(**{**SMALL, "vocab": SMALL_VOCABULARY}).items():
        of_norm = ("norm" in name or "_ln" in name) and name.endswith(".weight")
        values = torch.randn(shape, generator=generator) * 0.25 + float(of_norm)
        weights[name] = values.half()
    weights["logit_scale"] = torch.tensor(2.6592).half()
    if binary:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    files = {"config.json": published_config(**options), "preprocessor_config.json": PROCESSOR,
             "config_sentence_transformers.json": SENTENCE_TRANSFORMERS, "modules.json": MODULES,
             "special_tokens_map.json": NAMED,
             "tokenizer_config.json": {**NAMED, "tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 8194,
                                       "clean_up_tokenization_spaces": True}}  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    published_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


class Published:
    """encode_text, encode_image and the logits of the published code, for one directory."""

    def __init__(self, folder):
        file = folder / "model.safetensors"
        stored = load_file(file) if file.exists() else torch.load(folder / "pytorch_model.bin", weights_only=True)
        self.weights = {name: tensor.float() for name, tensor in stored.items()}
        self.config = json.loads((folder / "config.json").read_text())
        self.processor = json.loads((folder / "preprocessor_config.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode_text(self, texts, task=None, truncate_dim=None, normalize=True):
        options = self.config["text_config"]["hf_model_config_kwargs"]
        prefix = options["task_instructions"][task] if task else ""
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        self.tokenizer.enable_truncation(512)
        self.tokenizer.enable_padding(pad_id=1, pad_token="<pad>")
        ids = torch.tensor([e.ids for e in self.tokenizer.encode_batch([prefix + texts[i] for i in order])])
        rows = self._text(ids, options)[:, :truncate_dim]
        rows = F.normalize(rows, dim=-1) if normalize else rows
        return rows[torch.tensor(order).argsort()]

    def encode_image(self, images, truncate_dim=None, normalize=True):
        from torchvision import transforms

        size = self.processor["size"]
        steps = [
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(size),
            lambda image: image.convert("RGB"), transforms.ToTensor(),
            transforms.Normalize(self.processor["mean"], self.processor["std"]),
        ]  # fmt: skip
        rows = self._image(torch.stack([transforms.Compose(steps)(image) for image in images]))[:, :truncate_dim]
        return F.normalize(rows, dim=-1) if normalize else rows

    def logits(self, texts, images):
        return self.weights["logit_scale"].exp() * self.encode_image(images) @ self.encode_text(texts).T

    def _weight(self, name, options):
        of = f"text_model.transformer.roberta.{name}.parametrizations.weight."
        w, a, b = (self.weights[of + part] for part in ("original", "0.lora_A", "0.lora_B"))
        product = a[0] @ b[0] if "embeddings" in name else b[0] @ a[0]
        return w + product * options["lora_alpha"] / options["lora_rank"]

    def _norm(self, x, name, eps):
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps)

    def _text(self, ids, options):
        prefix = "text_model.transformer.roberta."
        keep = ids != 1
        x = F.embedding(ids, self._weight("embeddings.word_embeddings", options))
        x = x + self._weight("embeddings.token_type_embeddings", options)[0]
        x = self._norm(x, prefix + "emb_ln", 1e-5)
        n, length, width = x.shape
        heads = options.get("num_attention_heads", 16)
        d = width // heads
        base = options.get("rotary_emb_base", 20000.0)  # jina-embeddings-v3's
        angles = torch.arange(length)[:, None] * base ** (-torch.arange(0, d, 2) / d)
        cos, sin = angles.cos(), angles.sin()

        def turned(y):
            first, second = y[..., : d // 2], y[..., d // 2 :]
            return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)

        for i in range(self.config_layers(prefix)):
            layer = f"encoder.layers.{i}."

            def linear(name, y, layer=layer):
                return F.linear(y, self._weight(layer + name, options), self.weights[f"{prefix}{layer}{name}.bias"])

            q, k, v = linear("mixer.Wqkv", x).view(n, length, 3, heads, d).permute(2, 0, 3, 1, 4)
            scores = turned(q) @ turned(k).transpose(-1, -2) / math.sqrt(d)
            scores = scores.masked_fill(~keep[:, None, None], -1e9)
            mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, width)
            x = self._norm(x + linear("mixer.out_proj", mixed), f"{prefix}{layer}norm1", 1e-5)
            x = self._norm(x + linear("mlp.fc2", F.gelu(linear("mlp.fc1", x))), f"{prefix}{layer}norm2", 1e-5)
        return (x * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)

    def config_layers(self, prefix):
        return 1 + max(int(n.split("layers.")[1].split(".")[0]) for n in self.weights if n.startswith(prefix + "enc"))

    def _image(self, pixels):
        w, vision = self.weights, self.config["vision_config"]
        d = vision["head_width"]
        x = F.conv2d(pixels, w["vision_model.patch_embed.proj.weight"], w["vision_model.patch_embed.proj.bias"],
                     stride=vision["patch_size"])  # fmt: skip
        grid = x.shape[-1]
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([w["vision_model.cls_token"].expand(len(x), -1, -1), x], dim=1) + w["vision_model.pos_embed"]
        half = d // 2
        frequencies = 10000 ** (-torch.arange(0, half, 2) / half)
        places = torch.arange(grid) / grid * vision["pt_hw_seq_len"]
        angles = (places[:, None] * frequencies).repeat_interleave(2, dim=-1)
        angles = torch.cat([angles[:, None].expand(grid, grid, half), angles[None].expand(grid, grid, half)], dim=-1)
        cos, sin = angles.flatten(0, 1).cos(), angles.flatten(0, 1).sin()

        def turned(y):
            patches = y[:, :, 1:]
            swapped = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
            return torch.cat([y[:, :, :1], patches * cos + swapped * sin], dim=2)

        n, tokens, width = x.shape
        for i in range(vision["layers"]):
            block = f"vision_model.blocks.{i}."
            y, attn, mlp = self._norm(x, block + "norm1", 1e-6), block + "attn.", block + "mlp."
            q = F.linear(y, w[attn + "q_proj.weight"], w[attn + "q_bias"])
            k = F.linear(y, w[attn + "k_proj.weight"])
            v = F.linear(y, w[attn + "v_proj.weight"], w[attn + "v_bias"])
            q, k, v = (t.view(n, tokens, width // d, d).transpose(1, 2) for t in (q, k, v))
            mixed = (turned(q) @ turned(k).transpose(-1, -2) / math.sqrt(d)).softmax(-1) @ v
            mixed = self._norm(mixed.transpose(1, 2).reshape(n, tokens, width), attn + "inner_attn_ln", 1e-6)
            x = x + F.linear(mixed, w[attn + "proj.weight"], w[attn + "proj.bias"])
            y = self._norm(x, block + "norm2", 1e-6)
            gated = F.silu(F.linear(y, w[mlp + "w1.weight"], w[mlp + "w1.bias"]))
            gated = gated * F.linear(y, w[mlp + "w2.weight"], w[mlp + "w2.bias"])
            x = x + F.linear(self._norm(gated, mlp + "ffn_ln", 1e-6), w[mlp + "w3.weight"], w[mlp + "w3.bias"])
        return self._norm(x, "vision_model.norm", 1e-6)[:, 0]


@pytest.fixture
def published(tmp_path):
    """A small directory in the published layout, and the published arithmetic for it."""
    folder = write_published(tmp_path / "published")
    return folder, Published(folder)


@pytest.fixture(scope="session")
def table():
    return published_table


@pytest.fixture(scope="session")
def reference():
    return Published


@pytest.fixture
def write(tmp_path):
    """Writes another such directory: `write("name", binary=True, rotary_emb_base=…)`."""
    return lambda name, **options: write_published(tmp_path / name, **options)
