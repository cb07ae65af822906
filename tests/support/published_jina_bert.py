"""jina-embeddings-v2-base as it is published: names, arithmetic and files written out in plain PyTorch, so that the
tower is compared with something else. (transformers has no such model without remote code.)"""

import json
import math

import torch
import torch.nn.functional as F
from bert_words import SPECIAL, word_piece
from safetensors.torch import save_file

SHAPE = {"vocab_size": 48, "width": 48, "layers": 2, "heads": 6, "mlp_width": 40, "token_types": 2, "pad_id": 0,
         "layer_norm_eps": 1e-12, "positions": "alibi", "mlp": "geglu", "max_length": 8192}  # fmt: skip
# With the special ones and the letters 45; the table has 48 rows.
WORDS = ["##s", "##ing", "the", "dog", "run", "cafe", "##e", "##a", ",", ".", "!", "##x", "##y", "red"]
TOKENIZER_CONFIG = {**SPECIAL, "do_lower_case": True, "tokenizer_class": "BertTokenizer", "model_max_length": 8192,
                    "strip_accents": None, "tokenize_chinese_chars": True, "do_basic_tokenize": True,
                    "never_split": None, "clean_up_tokenization_spaces": True}  # fmt: skip


def published_config(**changes):
    """config.json of jina-embeddings-v2-base-en, in a small shape."""
    return {
        "_name_or_path": "jinaai/jina-bert-implementation", "architectures": ["JinaBertForMaskedLM"],
        "attention_probs_dropout_prob": 0.0, "classifier_dropout": None, "emb_pooler": "mean",
        "feed_forward_type": "geglu", "gradient_checkpointing": False, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1, "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 40,
        "layer_norm_eps": 1e-12, "max_position_embeddings": 8192, "model_max_length": 8192, "model_type": "bert",
        "num_attention_heads": 6, "num_hidden_layers": 2, "pad_token_id": 0, "position_embedding_type": "alibi",
        "torch_dtype": "float32", "transformers_version": "4.26.0", "type_vocab_size": 2, "use_cache": True,
        "vocab_size": 48, **changes,
    }  # fmt: skip


def published_weights(hidden=48, ff=40, vocab=48, layers=2, seed=0):
    """Every tensor under its published name."""
    shapes = {"embeddings.word_embeddings.weight": [vocab, hidden],
              "embeddings.token_type_embeddings.weight": [2, hidden], "embeddings.LayerNorm.weight": [hidden],
              "embeddings.LayerNorm.bias": [hidden], "pooler.dense.weight": [hidden, hidden],
              "pooler.dense.bias": [hidden]}  # fmt: skip
    for i in range(layers):
        layer = f"encoder.layer.{i}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            shapes |= {f"{layer}{name}.weight": [hidden, hidden], f"{layer}{name}.bias": [hidden]}
        for name in ("attention.output.LayerNorm", "mlp.layernorm"):
            shapes |= {f"{layer}{name}.weight": [hidden], f"{layer}{name}.bias": [hidden]}
        shapes |= {f"{layer}mlp.gated_layers.weight": [2 * ff, hidden], f"{layer}mlp.wo.weight": [hidden, ff],
                   f"{layer}mlp.wo.bias": [hidden]}  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator) + ("ayer" in name.split(".")[-2] and "weight" in name)
            if "orm" in name else 0.3 * torch.randn(shape, generator=generator)
            for name, shape in shapes.items()}  # fmt: skip


def slopes_of_bloom(heads):
    """The slopes of transformers' BLOOM, whose own code is ALiBi's authors'."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    alibi = build_alibi_tensor(torch.ones(1, 2), heads, torch.float64)  # [heads, 1, 2], positions 0 and 1
    return alibi[:, 0, 1]


class Published:
    """The published arithmetic on a padded batch, for weights under published names."""

    def __init__(self, weights, heads, dtype=torch.float64):
        self.w = {name: tensor.to(dtype).requires_grad_() for name, tensor in weights.items()}
        self.heads = heads

    def linear(self, x, name):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-12)

    def __call__(self, packed):
        rows = packed.ids.split(list(packed.lengths))
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
        keep = torch.arange(ids.shape[1]) < torch.tensor(packed.lengths)[:, None]
        x = F.embedding(ids, self.w["embeddings.word_embeddings.weight"])
        x = self.norm(x + self.w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        places = torch.arange(ids.shape[1])
        distance = (places[:, None] - places[None]).abs()
        bias = -slopes_of_bloom(self.heads).to(x.dtype)[:, None, None] * distance
        for i in range(1 + max(int(name.split(".")[2]) for name in self.w if name.startswith("encoder"))):
            layer = f"encoder.layer.{i}."
            q, k, v = (
                self.linear(x, f"{layer}attention.self.{part}").unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
            mixed = scores.masked_fill(~keep[:, None, None], -1e9).softmax(-1) @ v
            mixed = self.linear(mixed.transpose(1, 2).flatten(2), f"{layer}attention.output.dense")
            x = self.norm(x + mixed, f"{layer}attention.output.LayerNorm")
            hidden = self.linear(x, f"{layer}mlp.gated_layers")
            half = hidden.shape[-1] // 2
            gated = F.gelu(hidden[..., :half]) * hidden[..., half:]
            x = self.norm(x + self.linear(gated, f"{layer}mlp.wo"), f"{layer}mlp.layernorm")
        return (x * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)


def write(folder, tokenizer=None, weights=None, **changes):
    """A directory as jina-embeddings-v2-base-en is, with changed keys of its JSON files."""
    folder.mkdir()
    save_file(weights or published_weights(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(published_config(**changes)))
    built = word_piece(WORDS)
    built.save(str(folder / "tokenizer.json"))
    listed = sorted(built.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in listed))
    (folder / "tokenizer_config.json").write_text(json.dumps({**TOKENIZER_CONFIG, **(tokenizer or {})}))
    (folder / "special_tokens_map.json").write_text(json.dumps(SPECIAL))
    return folder
