"""The rotary base of a config.json that does not state it: what the code that wrote it would take."""

import json

import pytest
import torch
from safetensors.torch import save_file
from text_tower import TextTower

LENGTHS = [5, 1, 17, 40]


@pytest.mark.parametrize("parameters", [None, {}, {"rope_type": "default"}])
def test_transformers_default_is_taken_where_config_json_states_no_base(
    make_tower, pack, tmp_path, padded_mean, parameters
):
    import transformers

    make_tower().save_pretrained(tmp_path / "model")
    file = tmp_path / "model/config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"]
    file.write_text(json.dumps(config if parameters is None else {**config, "rope_parameters": parameters}))
    tower = TextTower.from_pretrained(tmp_path / "model")
    model = transformers.AutoModel.from_pretrained(tmp_path / "model").eval()
    assert tower.config.rope_theta == model.config.rope_parameters["rope_theta"]
    with torch.no_grad():
        torch.testing.assert_close(tower(pack(LENGTHS)), padded_mean(model, pack(LENGTHS)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stated", [None, 10000.0, 20000.0, 777.0])
def test_jinas_remote_code_rotates_by_ten_thousand_where_config_json_states_no_base(make_tower, pack, tmp_path, stated):
    """Its XLMRobertaFlashConfig: `rotary_emb_base=10000.0`."""
    plain = make_tower(rope_theta=stated or 10000.0)
    c = plain.config
    config = {
        "model_type": "xlm-roberta", "position_embedding_type": "rotary", "vocab_size": c.vocab_size,
        "hidden_size": c.width, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "intermediate_size": c.mlp_width, "layer_norm_eps": 1e-5, "pad_token_id": 1,
        **({} if stated is None else {"rotary_emb_base": stated}),
    }  # fmt: skip
    (tmp_path / "remote").mkdir()
    (tmp_path / "remote/config.json").write_text(json.dumps(config))
    save_file({f"roberta.{n}": p.contiguous() for n, p in plain.state_dict().items()},
              tmp_path / "remote/model.safetensors")  # fmt: skip
    tower = TextTower.from_pretrained(tmp_path / "remote")
    assert tower.config.rope_theta == (stated or 10000.0)
    assert torch.equal(tower(pack(LENGTHS)), plain(pack(LENGTHS)))
