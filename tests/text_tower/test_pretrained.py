"""Directories: what is written comes back, and what is damaged is named."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_tower import TextTower


def same(a, b):
    torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), rtol=0, atol=0)


@pytest.fixture
def saved(make_tower, tmp_path):
    make_tower().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(path, change):
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors")


@pytest.mark.parametrize("adapters", [False, True])
def test_a_tower_comes_back_bit_for_bit_with_its_configuration(
    make_tower, tokenizer, sentences, lora, tmp_path, adapters
):
    options = {
        "vocab_size": 482,
        "instructions": {"q": "frage: ", "ü": ""},
        "dropout": 0.1,
        "checkpointing": True,
        "rope_theta": 123.0,
    }
    tower = make_tower(tokenizer=tokenizer, **options, **(lora if adapters else {}))
    tower.save_pretrained(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = TextTower.from_pretrained(tmp_path / "model")
    same(back, tower)
    assert back.config == tower.config
    texts = [*sentences.values(), "<s> a <mask>b"]
    assert back.tokenizer(texts) == tokenizer(texts)
    assert all(p.requires_grad for p in back.parameters())


def test_merging_leaves_a_plain_tower_with_the_same_embeddings(make_tower, pack, lora, tmp_path):
    tower = make_tower(**lora)
    tower.save_pretrained(tmp_path / "model", merge=True)
    back = TextTower.from_pretrained(tmp_path / "model")
    assert back.config.adapters == ()
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    torch.testing.assert_close(back(pack([3, 9])), tower(pack([3, 9])), rtol=1e-4, atol=1e-4)


def test_adapters_can_be_added_to_weights_that_have_none(saved, make_tower, pack, lora):
    tower = TextTower.from_pretrained(saved, **lora)
    torch.testing.assert_close(tower(pack([3, 9])), make_tower()(pack([3, 9])))
    assert tower.encoder.layers[0].mlp.fc1.lora_A_0.any()
    tower.set_trainable("adapters")
    tower(pack([3])).sum().backward()


def test_training_settings_can_be_changed_on_reading_but_not_the_shape(saved):
    tower = TextTower.from_pretrained(saved, dropout=0.2, checkpointing=True, max_length=99)
    assert (tower.config.dropout, tower.config.checkpointing, tower.config.max_length) == (0.2, True, 99)
    with pytest.raises(ValueError, match=r"\['width'\] cannot be set"):
        TextTower.from_pretrained(saved, width=8)


def test_loaded_weights_do_not_hang_on_the_file(saved):
    tower = TextTower.from_pretrained(saved)
    before = {n: p.clone() for n, p in tower.named_parameters()}
    size = (saved / "model.safetensors").stat().st_size
    (saved / "model.safetensors").write_bytes(b"\0" * size)
    torch.testing.assert_close(dict(tower.named_parameters()), before, rtol=0, atol=0)


def test_half_precision_files_are_read_as_float32(make_tower, tmp_path):
    tower = make_tower().bfloat16()
    tower.save_pretrained(tmp_path / "model")
    back = TextTower.from_pretrained(tmp_path / "model")
    assert {p.dtype for p in back.parameters()} == {torch.float32}
    same(back.bfloat16(), tower)


def test_missing_unexpected_and_misshaped_keys_are_all_named(saved):
    def damage(weights):
        del weights["emb_ln.weight"], weights["encoder.layers.1.norm1.bias"]
        weights["surprise"] = torch.zeros(1)
        weights["encoder.layers.0.mlp.fc1.bias"] = torch.zeros(7)

    edit(saved, damage)
    with pytest.raises(ValueError) as error:
        TextTower.from_pretrained(saved)
    message = str(error.value)
    assert "looks like jina_embeddings_v3" in message
    assert "2 missing: emb_ln.weight; encoder.layers.1.norm1.bias" in message
    assert "1 unexpected: surprise" in message
    assert "1 mis-shaped: encoder.layers.0.mlp.fc1.bias [7], expected [48]" in message


def test_however_many_keys_are_wrong_all_are_named(saved):
    extra = {f"extra.{i:02}": torch.zeros(1) for i in range(50)}
    edit(saved, lambda weights: weights.update(extra))
    with pytest.raises(ValueError, match="50 unexpected: ") as error:
        TextTower.from_pretrained(saved)
    assert all(name in str(error.value) for name in extra)


def test_other_layouts_and_other_models_are_refused_by_name(saved):
    config = json.loads((saved / "config.json").read_text())

    def with_config(**changes):
        (saved / "config.json").write_text(json.dumps({**config, **changes}))

    for changes, message in (
        ({"model_type": "bert"}, "model_type 'bert'"),
        ({"model_type": "xlm-roberta"}, "expected them to agree"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ({"trilith": {"colour": 1}}, r"unknown keys \['colour'\]"),
    ):
        with_config(**changes)
        with pytest.raises(ValueError, match=message):
            TextTower.from_pretrained(saved)
    with_config()
    edit(saved, lambda w: w.update({"emb.parametrizations.weight.original": w.pop("emb_ln.weight")}))
    with pytest.raises(ValueError, match="names no lora_adaptations, but the weights hold adapters"):
        TextTower.from_pretrained(saved)


def test_files_that_are_no_utf_8_are_named(saved):
    (saved / "tokenizer.json").write_bytes(b'{"\xff": 1}')
    with pytest.raises(ValueError, match="tokenizer.json is not UTF-8 .*utf-8"):
        TextTower.from_pretrained(saved)
    (saved / "config.json").write_bytes(b'{"\xff": 1}')
    with pytest.raises(ValueError, match="config.json is not UTF-8"):
        TextTower.from_pretrained(saved)
    (saved / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list; expected a JSON object"):
        TextTower.from_pretrained(saved)


def test_shards_are_read_as_one_file_and_an_absent_one_is_named(saved, make_tower):
    weights = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    index = {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(weights)}
    for shard in set(index.values()):
        save_file({name: weights[name] for name in index if index[name] == shard}, saved / shard)
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    same(TextTower.from_pretrained(saved), make_tower())
    (saved / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-2.safetensors, which model.safetensors.index.json names"):
        TextTower.from_pretrained(saved)


def test_absent_and_damaged_files_are_named(saved, tmp_path, make_tower, lora):
    with pytest.raises(FileNotFoundError, match="config.json; expected a saved model"):
        TextTower.from_pretrained(tmp_path / "nowhere")
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no safetensors file, or is cut short"):
        TextTower.from_pretrained(saved)
    torch.save({"a": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match="no safetensors file"):
        TextTower.from_pretrained(saved)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        TextTower.from_pretrained(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        TextTower.from_pretrained(saved)
    make_tower(**lora).save_pretrained(tmp_path / "adapted")
    (tmp_path / "adapted/unmerged.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="expected unmerged.safetensors, or a folder for each"):
        TextTower.from_pretrained(tmp_path / "adapted")


class Harmful:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_pickle_that_would_run_code_is_refused(saved, capsys):
    (saved / "model.safetensors").unlink()
    torch.save({"emb_ln.weight": Harmful()}, saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no plain file of tensors"):
        TextTower.from_pretrained(saved)
    assert "code ran" not in capsys.readouterr().out


def test_saving_is_all_or_nothing_and_never_overwrites(saved, make_tower, tmp_path, monkeypatch):
    before = (saved / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        make_tower(seed=9).save_pretrained(saved)
    assert (saved / "model.safetensors").read_bytes() == before

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        make_tower().save_pretrained(tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("content", [{"emb_ln.weight": torch.ones(4), "epoch": 3}, [torch.ones(4)], torch.ones(4)])
def test_a_pickle_of_more_than_named_tensors_is_refused(saved, content):
    (saved / "model.safetensors").unlink()
    torch.save(content, saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin holds more than named tensors"):
        TextTower.from_pretrained(saved)
