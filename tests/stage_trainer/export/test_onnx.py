"""`--format onnx`: in onnxruntime the graphs give the model's vectors, for any number of texts, tokens and images."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from stage_trainer.cli import main
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.errors import UserError
from stage_trainer.formats import onnx as formats_onnx
from stage_trainer.formats.onnx import directory, graphs
from text_tower import PackedTokens

ALL = {"": 1e-4, "_fp16": 0.01, "_int8": 0.2, "_q4": 0.7}
SIZES = [(1, 1, 1), (1, 2, 3), (3, 40, 1), (7, 300, 2)]


def examples(out: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="session")
def exported_onnx(model, save, exported, tmp_path_factory) -> Path:
    """The graphs of `model`, in a folder that also holds `photo.jpg`."""
    folder = tmp_path_factory.mktemp("onnx")
    save(folder / "run/stage1", model)
    assert main(["export", str(folder / "run/stage1"), str(folder / "model"), "--format", "onnx"]) == 0
    shutil.copy(exported.parent / "photo.jpg", folder)
    return folder / "model"


@pytest.fixture(scope="session")
def session(exported_onnx):
    """A graph of the export, by its name."""
    sessions = {}

    def session(name: str) -> onnxruntime.InferenceSession:
        if name not in sessions:
            sessions[name] = onnxruntime.InferenceSession(exported_onnx / f"onnx/{name}.onnx")
        return sessions[name]

    return session


def unit(vectors) -> np.ndarray:
    return (vectors / vectors.norm(dim=-1, keepdim=True)).numpy()


def inputs(model, texts: int, tokens: int, images: int) -> tuple[list[list[int]], np.ndarray, torch.Tensor]:
    """Texts of different lengths, the longest of `tokens`; the same padded; images."""
    draw = np.random.default_rng(texts)
    lengths = [tokens, *draw.integers(1, tokens + 1, texts - 1).tolist()]
    ids = [draw.integers(4, model.text.config.vocab_size, length).tolist() for length in lengths]
    padded = np.array([row + [1] * (tokens - len(row)) for row in ids])
    return ids, padded, torch.from_numpy(draw.standard_normal((images, 3, 48, 48), dtype=np.float32))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("bits", ALL)
def test_each_graph_gives_the_towers_vectors(session, model, bits, sizes):
    ids, padded, images = inputs(model, *sizes)
    with torch.no_grad():
        text, image = model.text(PackedTokens.from_lists(ids)), model.vision(images)
    both = session(f"model{bits}").run(None, {"input_ids": padded, "pixel_values": images.numpy()})
    assert [vectors.dtype for vectors in both] == [np.float32] * 4
    halves = [
        *session(f"text_model{bits}").run(None, {"input_ids": padded}),
        *session(f"vision_model{bits}").run(None, {"pixel_values": images.numpy()}),
    ]
    for found in (halves, [both[0], both[2], both[1], both[3]]):
        for raw, normalised, wanted in zip(found[::2], found[1::2], (text, image), strict=True):
            assert np.abs(normalised - unit(wanted)).max() < ALL[bits]
            assert np.abs(unit(torch.from_numpy(raw)) - normalised).max() < 1e-6
            if not bits:
                assert np.abs(raw - wanted.numpy()).max() < 1e-4


@pytest.mark.parametrize("bits", ALL)
def test_the_combined_graph_has_the_published_signature_and_takes_half_of_it(session, model, bits):
    graph = session(f"model{bits}")
    assert [(i.name, i.type, i.shape) for i in graph.get_inputs()] == [
        ("input_ids", "tensor(int64)", ["texts", "tokens"]),
        ("pixel_values", "tensor(float)", ["images", 3, 48, 48]),
    ]
    assert [(o.name, o.type, o.shape) for o in graph.get_outputs()] == [
        ("text_embeddings", "tensor(float)", ["texts", 32]),
        ("image_embeddings", "tensor(float)", ["images", 32]),
        ("l2norm_text_embeddings", "tensor(float)", ["texts", 32]),
        ("l2norm_image_embeddings", "tensor(float)", ["images", 32]),
    ]
    _, padded, images = inputs(model, 3, 9, 2)
    none = np.zeros((0, 3, 48, 48), np.float32)
    text = graph.run(None, {"input_ids": padded, "pixel_values": none})
    image = graph.run(None, {"input_ids": np.ones((2, 1), np.int64), "pixel_values": images.numpy()})
    assert [vectors.shape for vectors in text] == [(3, 32), (0, 32)] * 2
    alone = session(f"text_model{bits}").run(None, {"input_ids": padded})
    assert np.abs(text[2] - alone[1]).max() < 1e-6
    alone = session(f"vision_model{bits}").run(None, {"pixel_values": images.numpy()})
    assert np.abs(image[3] - alone[1]).max() < 1e-6
    assert not image[0].any()  # a dummy text is no NaN
    assert not image[2].any()


def test_padding_changes_no_vector_wherever_it_stands(session, model):
    """Rotary positions are relative, so a tokenizer may pad on the left."""
    ids, padded, _ = inputs(model, 1, 9, 1)
    graph = session("text_model")
    plain = graph.run(None, {"input_ids": padded})[0]
    for row in (ids[0] + [1] * 5, [1] * 5 + ids[0]):
        assert np.abs(graph.run(None, {"input_ids": np.array([row])})[0] - plain).max() < 1e-5


def test_files_are_those_that_transformers_js_looks_for(exported_onnx, exported):
    names = {str(path.relative_to(exported_onnx)) for path in exported_onnx.rglob("*") if path.is_file()}
    assert names == {
        "README.md", "config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
        *(f"onnx/{name}{bits}.onnx" for name in ("text_model", "vision_model", "model") for bits in ALL),
    }  # fmt: skip
    config = json.loads((exported_onnx / "config.json").read_text())
    assert (config["model_type"], config["vision_config"]["image_size"]) == ("jina_clip", 48)
    assert config["transformers.js_config"] == {"use_external_data_format": {}}
    processor = json.loads((exported_onnx / "preprocessor_config.json").read_text())
    assert (processor["processor_class"], processor["image_processor_type"]) == (
        "JinaCLIPProcessor",
        "CLIPImageProcessor",  # since the model crops, which JinaCLIPImageProcessor does not
    )
    for file in exported_onnx.glob("onnx/*.onnx"):
        if not file.stem.endswith("q4"):  # an operator of onnxruntime's own
            onnx.checker.check_model(file, full_check=True)
        assert b".py" not in file.read_bytes(), "a path of the machine that exported"
    sizes = {file.name: file.stat().st_size for file in exported_onnx.glob("onnx/*.onnx")}
    bare = sum(file.stat().st_size for file in exported.rglob("*.safetensors"))
    assert sizes["text_model.onnx"] + sizes["vision_model.onnx"] < bare + 70_000
    assert max(sizes["model_fp16.onnx"], sizes["model_int8.onnx"], sizes["model_q4.onnx"]) < sizes["model.onnx"]


def test_weights_are_multiplied_as_they_stand(exported_onnx):
    """In 16 bits the vision tower joins some for a call, and runs of a graph would join them again and again."""
    for name in ("text_model", "vision_model", "text_model_fp16", "vision_model_fp16"):
        graph = onnx.load(exported_onnx / f"onnx/{name}.onnx").graph
        weights = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2 and min(tensor.dims) > 16}
        used = {node.op_type for node in graph.node if weights & set(node.input)}
        assert used <= {"MatMul", "Gemm", "Gather"}, name


def test_the_cards_example_for_onnxruntime_gives_the_models_vectors(exported_onnx, model, elsewhere):
    (code,) = examples(exported_onnx, "python")
    found = elsewhere(code + "out['text'], out['image'] = text, image\n", exported_onnx.parent, "torch", "transformers")
    assert np.abs(found["text"] - model.encode_text(["a red apple", "ein roter Apfel"])).max() < 1e-5
    assert np.abs(found["image"] - model.encode_image([exported_onnx.parent / "photo.jpg"])).max() < 1e-5


def test_our_own_reader_says_whom_the_graphs_are_for(exported_onnx):
    with pytest.raises(UserError, match=r"model holds ONNX graphs and no weights: .* Name the model that it was"):
        DualEncoder.from_pretrained(exported_onnx)


def test_the_card_says_what_is_in_the_graphs(exported_onnx):
    card = (exported_onnx / "README.md").read_text(encoding="utf-8")
    for words in (
        "library_name: transformers.js", "The LoRA adapter `retrieval.query` is merged into the weights",
        "`…_int8.onnx` (int8)", 'dtype: "fp32"', "Put the instruction of `retrieval.query` (above) before a text",
    ):  # fmt: skip
        assert words in card, words


def test_one_task_is_chosen_and_the_others_are_named(make_model, save, tmp_path, capsys, sentences):
    model = make_model(adapters=("retrieval.query", "separation"))
    save(tmp_path / "stage1", model)
    arguments = ["export", str(tmp_path / "stage1"), str(tmp_path / "out"), "--format=onnx", "--dtype=float32"]
    assert main([*arguments, "--task=separation"]) == 0
    said = capsys.readouterr().out
    assert "the adapter separation is merged" in said
    assert "not in this directory: the adapters retrieval.query" in said
    assert "The LoRA adapter `separation` is merged" in (tmp_path / "out/README.md").read_text()
    graph = onnxruntime.InferenceSession(tmp_path / "out/onnx/text_model.onnx")
    ids = model.text.tokenizer(sentences[:3])
    longest = max(map(len, ids))
    padded = np.array([row + [1] * (longest - len(row)) for row in ids])
    found = graph.run(["l2norm_text_embeddings"], {"input_ids": padded})[0]
    assert np.abs(found - model.encode_text(sentences[:3], task="separation")).max() < 1e-5
    assert np.abs(found - model.encode_text(sentences[:3])).max() > 0.01
    assert {file.name for file in (tmp_path / "out/onnx").iterdir()} == {
        "text_model.onnx", "vision_model.onnx", "model.onnx",
    }  # fmt: skip


def test_weights_too_many_for_one_file_stand_beside_it(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_BYTES", 60_000)
    model = make_model(adapters=(), vision={"crop_pct": 1.0})
    directory.write(model, tmp_path / "out", precisions=("float32", "int8", "q4"), card=str)
    beside = {file.name for file in (tmp_path / "out/onnx").glob("*_data")}
    assert {"text_model.onnx_data", "vision_model.onnx_data", "model.onnx_data", "model_int8.onnx_data"} <= beside
    config = json.loads((tmp_path / "out/config.json").read_text())
    said = config["transformers.js_config"]["use_external_data_format"]
    assert {f"{name}_data" for name, number in said.items() if number} == beside
    for file in (tmp_path / "out/onnx").glob("*.onnx"):
        assert file.stat().st_size < 100_000  # the graph alone
    processor = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert processor["image_processor_type"] == "JinaCLIPImageProcessor"
    shutil.move(tmp_path / "out", tmp_path / "moved")
    _, padded, images = inputs(model, 3, 9, 2)
    for bits, bound in {"": 1e-4, "_int8": 0.2, "_q4": 0.7}.items():
        graph = onnxruntime.InferenceSession(tmp_path / f"moved/onnx/model{bits}.onnx")
        found = graph.run(None, {"input_ids": padded, "pixel_values": images.numpy()})[3]
        with torch.no_grad():
            assert np.abs(found - unit(model.vision(images))).max() < bound


def test_push_takes_graphs_that_open_and_no_others(exported_onnx, tmp_path, capsys, monkeypatch):
    pushed = []

    class Hub:
        endpoint = "http://hub"

        def create_repo(self, *_, **__):
            pass

        def upload_folder(self, folder_path, **_):
            pushed.append(folder_path)
            return SimpleNamespace(commit_url="http://hub/commit")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    folder = shutil.copytree(exported_onnx, tmp_path / "model", ignore=shutil.ignore_patterns("*_*.onnx"))
    assert main(["push", str(folder), "me/model"]) == 0
    assert pushed == [folder]
    (folder / "onnx/model.onnx").write_bytes((folder / "onnx/model.onnx").read_bytes()[:-1000])
    assert main(["push", str(folder), "me/model"]) == 2
    assert "onnx/model.onnx does not open in onnxruntime (" in capsys.readouterr().err
    assert len(pushed) == 1


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_before_anything_is_loaded(missing, tmp_path, capsys, monkeypatch):
    found = formats_onnx.find_spec
    monkeypatch.setattr(formats_onnx, "find_spec", lambda name: None if name == missing else found(name))
    assert main(["export", str(tmp_path / "no such"), str(tmp_path / "out"), "--format=onnx"]) == 2
    said = capsys.readouterr().err
    assert f"needs {missing}, which is not installed" in said
    assert "`pip install onnx onnxscript onnxruntime`" in said


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        (["--task=topic"], {}, "there is no adapter 'topic' to merge; the text tower has retrieval.query"),
        ([], {"crop_mode": "border"}, "crop_mode border, and transformers.js knows"),
        ([], {"resolution": (48, 64)}, "resolution (48, 64), and transformers.js knows a square"),
        (["--lora=kept"], {}, "a graph has no adapters"),
        ([], {"pad_id": 0}, "the text tower's pad_id is 0, and its tokenizer pads with 1"),
        ([], {"vocab_size": 600}, "tokens and the text tower 600: they are of different models"),
    ],
)
@pytest.mark.filterwarnings("ignore:the tokenizer has")
def test_what_a_graph_or_transformers_js_cannot_be_is_refused(
    options, changes, words, make_model, save, tmp_path, capsys
):
    towers = {"text" if {"pad_id", "vocab_size"} & changes.keys() else "vision": changes}
    save(tmp_path / "stage1", make_model(**towers))
    assert main(["export", str(tmp_path / "stage1"), str(tmp_path / "out"), "--format=onnx", *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_numbers_too_large_for_float16_are_refused_and_float32_holds_them(make_model, save, tmp_path, capsys):
    model = make_model(adapters=())
    with torch.no_grad():
        model.text.encoder.layers[0].mlp.fc1.bias.fill_(1e5)
    save(tmp_path / "stage1", model)
    arguments = ["export", str(tmp_path / "stage1"), str(tmp_path / "out"), "--format=onnx"]
    assert main([*arguments, "--dtype=float16"]) == 2
    said = capsys.readouterr().err
    assert "text_model_fp16.onnx gives other vectors than the model" in said
    assert "leave it out, with --dtype float32" in said
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--dtype=float32"]) == 0
