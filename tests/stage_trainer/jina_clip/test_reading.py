"""A directory in the layout of the published jina-clip-v2 is one model, with the published arithmetic's numbers."""

import http.server
import json
import math
import pickle
import threading
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from stage_trainer import DualEncoder, hub
from stage_trainer.errors import UserError

TEXTS = ["a dog", "the query for a dog, the dog", "e", "x " * 900, "unknown ßß letters"]


def pictures():
    generator = np.random.default_rng(0)
    shapes = [(48, 48), (70, 50), (51, 130), (30, 40)]
    return [Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]


def close(found, expected, most=1e-5):
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=most)


@pytest.mark.parametrize("binary", [False, True])
def test_text_image_and_logits_are_the_published_ones(write, reference, binary):
    folder = write("model", binary=binary)
    model, theirs = DualEncoder.from_pretrained(folder), reference(folder)
    close(model.encode_text(TEXTS), theirs.encode_text(TEXTS))
    close(model.encode_text(TEXTS, task="retrieval.query"), theirs.encode_text(TEXTS, "retrieval.query"))
    assert (theirs.encode_text(TEXTS) - theirs.encode_text(TEXTS, "retrieval.query")).abs().max() > 0.01
    close(model.encode_image(pictures()), theirs.encode_image(pictures()))
    ours = math.exp(model.logit_scale.item()) * model.encode_image(pictures()) @ model.encode_text(TEXTS).T
    close(ours, theirs.logits(TEXTS, pictures()))
    # What belongs to the model as a whole.
    assert model.logit_scale.item() == model.text_logit_scale.item() == float(torch.tensor(2.6592).half())
    assert model.matryoshka_dims == (32, 64)
    assert model.text.config.tasks == ("retrieval.query",)


def test_dims_are_cut_before_the_rows_get_length_one(published):
    folder, theirs = published
    model = DualEncoder.from_pretrained(folder)
    for dim in (1, 32, 64):
        close(model.encode_text(TEXTS, truncate_dim=dim), theirs.encode_text(TEXTS, truncate_dim=dim))
        close(model.encode_image(pictures(), truncate_dim=dim), theirs.encode_image(pictures(), truncate_dim=dim))
    close(model.encode_text(TEXTS, normalize=False), theirs.encode_text(TEXTS, normalize=False), 1e-4)


def test_the_instruction_counts_towards_512_tokens(published):
    folder, theirs = published
    model = DualEncoder.from_pretrained(folder)
    long = ["a " * 250 + "dog", "a " * 250 + "query"]
    plain, instructed = (model.encode_text(long, task=task) for task in (None, "retrieval.query"))
    assert np.abs(plain[0] - plain[1]).max() > 1e-6
    assert np.abs(instructed[0] - instructed[1]).max() == 0  # the last words are cut off
    close(instructed, theirs.encode_text(long, "retrieval.query"))


def test_there_is_one_instruction_and_the_adapter_is_on_without_it(published):
    folder, _ = published
    model = DualEncoder.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"unknown task 'retrieval.passage'; this tower knows \['retrieval.query'\]"):
        model.encode_text(["a"], task="retrieval.passage")
    bare = DualEncoder.from_pretrained(folder, text={"adapters": ()})
    assert np.abs(bare.encode_text(["a dog"]) - model.encode_text(["a dog"])).max() > 0.01


def test_the_rotary_base_is_the_stated_one_or_that_of_the_named_repository(write, reference):
    for options in ({}, {"rotary_emb_base": 500.0}):
        folder = write(f"base{len(options)}", **options)
        close(DualEncoder.from_pretrained(folder).encode_text(TEXTS), reference(folder).encode_text(TEXTS))
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["hf_model_name_or_path"] = "someone/else"
    file.write_text(json.dumps(config))
    assert DualEncoder.from_pretrained(folder).text.config.rope_theta == 500.0
    del config["text_config"]["hf_model_config_kwargs"]["rotary_emb_base"]
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not say the rotary base"):
        DualEncoder.from_pretrained(folder)


def with_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


WQKV = "text_model.transformer.roberta.encoder.layers.0.mixer.Wqkv."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.update(text_projection=torch.ones(2)), "1 unexpected: text_projection"),
        (lambda w: w.update({"logit_scale_2": torch.ones(2)}), "its weights have logit_scale_2"),
        (lambda w: w.update({"vision_model.head.weight": torch.ones(64, 64)}), "have vision_model.head.weight"),
        (lambda w: w.update({"vision_model.rope.freqs_cos": torch.ones(9, 64)}), "have vision_model.rope.freqs_cos"),
        (lambda w: w.update({"lm_head.bias": torch.ones(2)}), "its weights have lm_head.bias"),
        (lambda w: w.update({f"{WQKV[:38]}.pooler.dense.bias": torch.ones(2)}), "pooler.dense.bias"),
        (lambda w: w.pop(f"{WQKV}bias"), "1 missing: .*Wqkv.bias"),
        (lambda w: w.pop("vision_model.cls_token"), "missing: cls_token"),
        (lambda w: w.pop("logit_scale"), "no logit_scale of shape .., but none"),
        (lambda w: w.update(logit_scale=torch.ones(1)), r"but one of shape \[1\]"),
        (lambda w: w.update(logit_scale=torch.tensor(float("nan"))), "logit_scale is nan"),
        (lambda w: w.update({f"{WQKV}bias": torch.ones(5)}), r"Wqkv.bias \[5\], expected \[192\]"),
        (lambda w: w.update({f"{WQKV}bias": torch.ones(192, dtype=torch.int8)}), "not of floating point"),
    ],
)
def test_weights_that_are_not_the_layouts_are_refused_by_name(published, change, words):
    folder, _ = published
    with_weights(folder, change)
    with pytest.raises(UserError, match=words):
        DualEncoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("place", "key", "value", "words"),
    [
        ((), "truncate_dim", 32, "truncate_dim 32"),
        ((), "add_projections", True, "add_projections True"),
        ((), "gamma", 2, "gamma 2"),
        ((), "matryoshka_dimensions", "64", "matryoshka_dimensions is 64"),
        ((), "trilith_clip", {"surprise": 1}, "trilith_clip has surprise"),
        ((), "trilith_clip", {"text_logit_scale": "1"}, "text_logit_scale is '1'"),
        ((), "trilith_clip", {"text": {"width": 3}}, "trilith_clip.text has width"),
        (
            (),
            "trilith_clip",
            {"text": {"adapters": []}},
            "adapters should be merged into the weights, but .* is not zero",
        ),
        ((), "trilith_clip", {"text": {"instructions": {}}}, "another instruction of 'retrieval.query'"),
        ((), "trilith_clip", {"vision": {"width": 3}}, "trilith_clip.vision has width"),
        (("text_config",), "pooler_type", "cls_pooler", "pooler_type 'cls_pooler'"),
        (("text_config",), "default_instruction_task", "retrieval.query", "default_instruction_task"),
        (("text_config",), "default_lora_task", "separation", "default_lora_task 'separation'"),
        (("text_config",), "gamma", 2, "text_config.gamma 2"),
        (("text_config", "hf_model_config_kwargs"), "gamma", 2, "hf_model_config_kwargs.gamma 2"),
        (("text_config", "hf_model_config_kwargs"), "position_embedding_type", "alibi", "'alibi'"),
        (("vision_config",), "post_norm", True, "post_norm True"),
        (("vision_config",), "gamma", 2, "vision_config has gamma"),
    ],
)
def test_what_config_json_says_is_followed_or_refused_by_name(published, place, key, value, words):
    folder, _ = published
    config = json.loads((folder / "config.json").read_text())
    at = config
    for step in place:
        at = at[step]
    at[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        DualEncoder.from_pretrained(folder)


def test_dims_beyond_the_width_are_left_out_with_a_warning(published):
    folder, _ = published
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "matryoshka_dimensions": [32, 64, 128]}))
    with pytest.warns(UserWarning, match=r"says dims \[128\], but is 64 wide"):
        assert DualEncoder.from_pretrained(folder).matryoshka_dims == (32, 64)


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_of_more_than_tensors_is_refused(write, capsys):
    folder = write("model", binary=True)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(UserError, match=r"pytorch_model.bin is no plain file of tensors"):
        DualEncoder.from_pretrained(folder)
    assert "run" not in capsys.readouterr().out


def test_a_hub_name_without_network_says_what_to_fetch(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no someone/a-model here.* `hf download someone/a-model --local-dir FOLDER`"):
        DualEncoder.from_pretrained("someone/a-model")
    with pytest.raises(UserError, match="holds no model"):  # a folder's name
        DualEncoder.from_pretrained("a-model")


def hub_of(folder, files):
    """A handler that answers as the Hugging Face hub does for one repository, and notes what is asked."""
    commit = "a" * 40

    class Handler(http.server.BaseHTTPRequestHandler):
        asked: ClassVar[set[str]] = set()

        def do_GET(self, body=True):
            path = self.path.partition("?")[0]
            name = path.rpartition(f"/resolve/{commit}/")[2]
            headers = {"X-Repo-Commit": commit}
            if path.startswith("/api/models/someone/a-model/tree/"):
                content = json.dumps([{"type": "file", "path": f, "oid": "b" * 40, "size": 1} for f in files]).encode()
            elif path.startswith("/api/models/someone/a-model"):
                siblings = [{"rfilename": f} for f in files]
                about = {"id": "someone/a-model", "sha": commit, "siblings": siblings, "private": False}
                content = json.dumps(about).encode()
            elif name in files:
                self.asked.add(name)
                content = (folder / name).read_bytes() if (folder / name).exists() else b"never asked for"
                headers["ETag"] = f'"{name}"'
            else:
                return self.send_error(404)
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_HEAD(self):
            self.do_GET(body=False)

        def log_message(self, *_):
            pass

    return Handler


@pytest.mark.parametrize(
    ("files", "patterns"),
    [
        (["model.safetensors", "2_Dense/model.safetensors"], []),
        (["model.safetensors", "2_Dense/config.json"], ["2_Dense/*.bin"]),
        (["config.json", "2_Dense/model.safetensors"], ["*.bin"]),
    ],
)
def test_of_each_part_that_has_no_other_weights_the_older_form_is_fetched(tmp_path, files, patterns):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(hub._older_forms(tmp_path)) == patterns


@pytest.mark.parametrize("binary", [False, True])
def test_a_hub_name_is_fetched_once_without_graphs_code_or_the_same_weights_again(write, tmp_path, binary, monkeypatch):
    from huggingface_hub import constants

    folder = write("model", binary=binary)
    there = {file.name for file in folder.iterdir()}
    handler = hub_of(folder, {*there, "pytorch_model.bin", "onnx/model.onnx", "custom_st.py", "README.md"})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    for name, value in (
        ("ENDPOINT", url), ("HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_CACHE", str(tmp_path / "cache")), ("HF_HUB_DISABLE_XET", True), ("HF_HUB_OFFLINE", False),
    ):  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    try:
        assert DualEncoder.from_pretrained("someone/a-model").text.config.width == 64
        assert handler.asked == there
    finally:
        server.shutdown()
        server.server_close()
    # Without network what is there is taken.
    assert DualEncoder.from_pretrained("someone/a-model").text.config.width == 64
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert DualEncoder.from_pretrained("someone/a-model").text.config.width == 64
