"""Every layout is read weight for weight, and what can be written comes back bit for bit."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_tower import TextTower
from torch import nn
from torch.nn.utils import parametrize

TASKS = ["retrieval.query", "retrieval.passage", "separation"]
LENGTHS = [5, 1, 17, 40]


class LowRank(nn.Module):
    """jina's parametrization: all tasks stacked; a table's A is `[n, rows, r]`, a Linear's `[n, r, in]`."""

    def __init__(self, shape, table, task, scale):
        super().__init__()
        rows, columns = shape
        n, r = len(TASKS), 4
        self.lora_A = nn.Parameter(torch.randn(n, rows, r) if table else torch.randn(n, r, columns))
        self.lora_B = nn.Parameter(torch.randn(n, r, columns) if table else torch.randn(n, rows, r))
        self.table, self.task, self.scale = table, task, scale

    def forward(self, weight):
        a, b = self.lora_A[self.task], self.lora_B[self.task]
        return weight + self.scale * (a @ b if self.table else b @ a)


def remote_model(plain: TextTower, task: int, alpha: float) -> nn.Module:
    """Modules named as in jina's remote code, with PyTorch's own parametrizations on every Linear and both tables."""
    root = nn.Module()
    root.roberta = nn.Module()
    modules = {n.rpartition(".")[0] for n, _ in plain.named_parameters()}
    for name in sorted({*modules, "pooler.dense"}):
        parent = root.roberta
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        if name == "pooler.dense":
            module = nn.Linear(32, 32)
        else:
            source = plain.get_submodule(name)
            rows, *columns = source.weight.shape
            kind = nn.Embedding if isinstance(source, nn.Embedding) else nn.Linear if columns else nn.LayerNorm
            module = (
                kind(rows)
                if kind is nn.LayerNorm
                else kind(*((rows, columns[0])[:: 1 if kind is nn.Embedding else -1]))
            )
            module.load_state_dict({n: p for n, p in source.state_dict().items() if "lora" not in n})
        if module.weight.dim() == 2:
            low_rank = LowRank(module.weight.shape, isinstance(module, nn.Embedding), task, alpha / 4)
            parametrize.register_parametrization(module, "weight", low_rank)
        parent.add_module(leaf, module)
    return root


def remote_config(tower, **changes):
    c = tower.config
    return {
        "architectures": ["XLMRobertaLoRA"], "model_type": "xlm-roberta", "position_embedding_type": "rotary",
        "rotary_emb_base": 20000.0, "vocab_size": c.vocab_size, "hidden_size": c.width, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "intermediate_size": c.mlp_width, "layer_norm_eps": 1e-5, "pad_token_id": 1,
        "hidden_act": "gelu", "type_vocab_size": 1, "max_position_embeddings": 258, "lora_adaptations": TASKS,
        "lora_rank": 4, "lora_alpha": 1, "lora_dropout_p": 0.0, "use_flash_attn": True,
        "task_instructions": {task: f"{task}: " for task in TASKS}, **changes,
    }  # fmt: skip


def save(path, config, weights, pickle=False):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    if pickle:
        torch.save(weights, path / "pytorch_model.bin")
    else:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / "model.safetensors")


def effective(root, plain) -> dict:
    """Plain weights of a parametrized model, its adapter added in by PyTorch."""
    return {n: root.roberta.get_submodule(n.rpartition(".")[0]).get_parameter(n.rpartition(".")[2])
            if not hasattr(root.roberta.get_submodule(n.rpartition(".")[0]), "parametrizations")
            else getattr(root.roberta.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2])
            for n, _ in plain.named_parameters()}  # fmt: skip


@pytest.mark.parametrize("pickle", [False, True])
@pytest.mark.parametrize("task", [0, 2])
def test_jinas_remote_code_layout_is_read_with_every_adapter(make_tower, pack, tmp_path, task, pickle):
    plain = make_tower()
    torch.manual_seed(3)
    remote = remote_model(plain, task, alpha=1)
    save(tmp_path / "remote", remote_config(plain), remote.state_dict(), pickle)
    tower = TextTower.from_pretrained(tmp_path / "remote")
    assert tower.config.adapters == tuple(TASKS)
    assert (tower.config.lora_rank, tower.config.lora_alpha, tower.config.rope_theta) == (4, 1, 20000.0)
    assert tower.config.max_length == 256
    assert tower.config.instructions["separation"] == "separation: "
    plain.load_state_dict(effective(remote, plain))
    with torch.no_grad():
        expected = plain(pack(LENGTHS))
        torch.testing.assert_close(tower(pack(LENGTHS), adapter=TASKS[task]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("task", [0, 2])
def test_of_several_adapters_those_asked_for_are_taken(make_tower, pack, tmp_path, task):
    """As the paper's recipe takes the first of jina-embeddings-v3's five; held against PyTorch's parametrizations."""
    plain = make_tower()
    torch.manual_seed(3)
    remote = remote_model(plain, task, alpha=1)
    save(tmp_path / "remote", remote_config(plain), remote.state_dict())
    plain.load_state_dict(effective(remote, plain))
    tower = TextTower.from_pretrained(tmp_path / "remote", adapters=(TASKS[task],), lora_rank=4, lora_alpha=1)
    assert (tower.config.adapters, tower.config.instructions) == ((TASKS[task],), {TASKS[task]: f"{TASKS[task]}: "})
    with torch.no_grad():
        torch.testing.assert_close(tower(pack(LENGTHS)), plain(pack(LENGTHS)), rtol=1e-4, atol=1e-4)
    # … and out of each layout of ours, in the order asked for.
    whole = TextTower.from_pretrained(tmp_path / "remote")
    for layout in ("transformers", "peft", "remote-code"):
        whole.save_pretrained(tmp_path / layout, layout=layout)
        two = TextTower.from_pretrained(tmp_path / layout, adapters=(TASKS[task], TASKS[1]))
        assert two.config.adapters == (TASKS[task], TASKS[1])
        for name in two.config.adapters:
            assert torch.equal(two(pack(LENGTHS), adapter=name), whole(pack(LENGTHS), adapter=name))
    with pytest.raises(ValueError, match=r"has the adapters \['retrieval.query', .*; \['mine'\] are none of them"):
        TextTower.from_pretrained(tmp_path / "remote", adapters=("retrieval.query", "mine"))


def test_jina_xlm_roberta_without_adapters_is_read(make_tower, pack, tmp_path):
    plain = make_tower(rope_theta=10000.0)
    weights = {f"roberta.{n}": p for n, p in plain.state_dict().items()} | {"lm_head.bias": torch.zeros(600)}
    save(tmp_path / "remote", remote_config(plain, rotary_emb_base=10000.0), weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # these weights know rotary positions
        tower = TextTower.from_pretrained(tmp_path / "remote")
    assert torch.equal(tower(pack(LENGTHS)), plain(pack(LENGTHS)))


def test_the_text_half_of_jina_clip_is_taken_out_of_its_whole_file(make_tower, pack, tmp_path):
    plain = make_tower(width=128, heads=2, mlp_width=96)
    torch.manual_seed(3)
    remote = remote_model(plain, 0, alpha=4)
    weights = {f"text_model.transformer.{n}": t for n, t in remote.state_dict().items() if "pooler" not in n}
    weights |= {"logit_scale": torch.zeros(()), "vision_model.blocks.0.norm1.weight": torch.zeros(8)}
    options = {"lora_adaptations": TASKS, "lora_rank": 4, "lora_alpha": 4, "use_flash_attn": True,
               "task_instructions": dict.fromkeys(TASKS, "")}  # fmt: skip
    text = {"embed_dim": 128, "hf_model_name_or_path": "jinaai/jina-embeddings-v3", "hf_model_config_kwargs": options}
    text |= {"pad_token_id": None, "tie_encoder_decoder": False, "use_bfloat16": False}  # as transformers 4 saves it
    config = {"model_type": "jina_clip", "_name_or_path": "jinaai/jina-clip-v2", "text_config": text}
    save(tmp_path / "clip", config, weights)
    with pytest.warns(UserWarning, match="CC-BY-NC-4.0"):
        tower = TextTower.from_pretrained(tmp_path / "clip")
    c = tower.config
    assert (c.vocab_size, c.width, c.layers, c.heads, c.mlp_width, c.rope_theta) == (600, 128, 3, 2, 96, 20000.0)
    plain.load_state_dict(effective(remote, plain))
    with torch.no_grad():
        torch.testing.assert_close(tower(pack(LENGTHS)), plain(pack(LENGTHS)), rtol=1e-4, atol=1e-4)

    weights["text_model.surprise"] = torch.zeros(1)
    save(tmp_path / "more", config, weights)
    with pytest.raises(
        ValueError, match=r"looks like the text half of jina-clip-v2 .*\n.*1 unexpected: text_model.surp"
    ):
        TextTower.from_pretrained(tmp_path / "more")
    del weights["text_model.surprise"]
    save(tmp_path / "short", {**config, "truncate_dim": 64}, weights)
    with pytest.raises(ValueError, match="truncate_dim 64; this tower knows null only"):  # as of the image half
        TextTower.from_pretrained(tmp_path / "short")
    wrong = {**text, "hf_model_config_kwargs": [1]}
    save(tmp_path / "wrong", {**config, "text_config": wrong}, weights)
    with pytest.raises(ValueError, match=r"hf_model_config_kwargs \[1\]; expected an object"):
        TextTower.from_pretrained(tmp_path / "wrong")
    for name in ("a/text-model", "x/text-model", None):  # its base is not known
        folder = tmp_path / f"from {name}".replace("/", "-")
        save(folder, {**config, "text_config": {**text, "hf_model_name_or_path": name}}, weights)
        with pytest.raises(ValueError, match="does not say the rotary base of its text half"):
            TextTower.from_pretrained(folder)


@pytest.mark.parametrize("layout", ["transformers", "peft", "remote-code"])
@pytest.mark.parametrize("adapters", [False, True])
def test_every_layout_that_is_written_comes_back_bit_for_bit(make_tower, tokenizer, lora, tmp_path, layout, adapters):
    tower = make_tower(vocab_size=482, tokenizer=tokenizer, **(lora if adapters else {}))
    tower.save_pretrained(tmp_path / "there", layout=layout)
    back = TextTower.from_pretrained(tmp_path / "there")
    assert back.config.adapters == tower.config.adapters
    torch.testing.assert_close(dict(back.state_dict()), dict(tower.state_dict()), rtol=0, atol=0)
    # … and from there to every other.
    for other in ("transformers", "peft", "remote-code"):
        back.save_pretrained(tmp_path / other, layout=other)
        again = TextTower.from_pretrained(tmp_path / other)
        torch.testing.assert_close(dict(again.state_dict()), dict(tower.state_dict()), rtol=0, atol=0)


def test_what_is_written_in_jinas_layout_has_exactly_its_keys(make_tower, lora, tmp_path):
    tower = make_tower(**lora)
    tower.save_pretrained(tmp_path / "remote", layout="remote-code")
    found = load_file(tmp_path / "remote/model.safetensors")
    expected = {n for n in remote_model(tower, 0, 1).state_dict() if "pooler" not in n}
    assert found.keys() == expected
    config = json.loads((tmp_path / "remote/config.json").read_text())
    assert config["lora_adaptations"] == list(config["task_instructions"]) == list(lora["adapters"])


def test_keys_are_named_as_the_file_has_them(make_tower, tmp_path):
    plain = make_tower()
    weights = remote_model(plain, 0, 1).state_dict()
    lost = "roberta.encoder.layers.1.mixer.Wqkv.parametrizations.weight.0.lora_B"
    del weights[lost]
    weights["roberta.emb_ln.weight"] = torch.zeros(7)
    save(tmp_path / "remote", remote_config(plain), weights)
    with pytest.raises(ValueError, match="looks like jina's remote-code layout") as error:
        TextTower.from_pretrained(tmp_path / "remote")
    assert f"1 missing: {lost}" in str(error.value)
    assert "1 mis-shaped: roberta.emb_ln.weight [7], expected [32]" in str(error.value)
    assert "unexpected" not in str(error.value)
    with pytest.raises(ValueError, match="layout is 'xlm-r'; expected one of"):
        plain.save_pretrained(tmp_path / "x", layout="xlm-r")
