"""What cannot be exported is one message, and nothing is left behind."""

import io
import json
import pickle
import shutil
import warnings

import pytest
from safetensors.torch import load_file, save_file
from stage_trainer.checkpoint.load import at
from stage_trainer.cli import main
from text_tower import Tokenizer


def refused(capsys, source, out, *options: str) -> str:
    """The message of an export that is refused."""
    assert main(["export", str(source), str(out), *options]) == 2
    assert not out.exists() or out.name == "there"
    assert not [path for path in out.parent.iterdir() if path.name.endswith(".partial")]
    return capsys.readouterr().err


@pytest.fixture
def checkpoint(model, save, tmp_path):
    return save(tmp_path / "run/stage1", model)


def change(file, **entries):
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def test_a_target_that_exists_stays_as_it_is(checkpoint, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/mine").write_text("x")
    assert "there exists already; name another place" in refused(capsys, checkpoint, tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["mine"]


def test_a_half_saved_checkpoint_is_refused(checkpoint, tmp_path, capsys):
    (checkpoint / "model/vision/model.safetensors").unlink()
    assert "vision/model.safetensors is missing; name another" in refused(capsys, checkpoint, tmp_path / "out")
    half = shutil.copytree(checkpoint, tmp_path / "run/stage1/.step-0000005.partial")
    (half / "state.json").unlink()
    assert "holds no model; expected" in refused(capsys, half, tmp_path / "out")


def shorten(path):
    file = path / "text/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def header_of_gigabytes(path):
    """Its header says a table of 4 GB, which the file does not hold."""
    file = path / "text/model.safetensors"
    file.unlink()
    header = (
        b'{"embeddings.word_embeddings.weight":{"dtype":"F32","shape":[1000000,1000],"data_offsets":[0,4000000000]}}'
    )
    file.write_bytes(len(header).to_bytes(8, "little") + header)


def a_header_of_gigabytes(path):
    (path / "vision/model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")


class Runs:
    def __reduce__(self):
        return eval, ("open('ran', 'w')",)


def pickled(path):
    (path / "vision/model.safetensors").unlink()
    (path / "vision/pytorch_model.bin").write_bytes(pickle.dumps({"a": Runs()}))


def pickled_text(path):
    (path / "text/model.safetensors").unlink()
    (path / "text/pytorch_model.bin").write_bytes(pickle.dumps({"a": Runs()}))


def changed(tower, change):
    def damage(path):
        file = path / tower / "model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file)

    return damage


def renamed(weights):
    weights["someones.weight"] = weights.pop("emb_ln.weight")


def narrowed(weights):
    weights["cls_token"] = weights["cls_token"][..., :16].contiguous()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shorten, "model.safetensors is no safetensors file, or is cut short"),
        (header_of_gigabytes, "model.safetensors is no safetensors file, or is cut short"),
        (a_header_of_gigabytes, "vision/model.safetensors"),
        (pickled, "vision/pytorch_model.bin"),
        (pickled_text, "pytorch_model.bin is no plain file of tensors"),
        (changed("text", renamed), "missing: emb_ln.weight"),
        (changed("vision", narrowed), "cls_token [1, 1, 16] where [1, 1, 32] is needed"),
        (lambda path: change(path / "text/config.json", hidden_size=2**20), "do not fit its config.json"),
        (
            lambda path: change(path / "vision/preprocessor_config.json", image_mean=[0.1, 0.1, 0.1]),
            "mean is (0.1, 0.1, 0.1), and the tower's",
        ),
    ],
)
def test_an_exported_model_that_was_changed_since_is_refused(damage, words, exported, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = shutil.copytree(exported, tmp_path / "source")
    damage(source)
    assert words in refused(capsys, source, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_of_another_model_is_refused(checkpoint, tokenizer, tmp_path, capsys):
    from sentencepiece import SentencePieceTrainer

    content = io.BytesIO()
    words = [f"{a}{b} {b}{c}{a}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrst"]
    SentencePieceTrainer.train(sentence_iterator=iter(words), model_writer=content, vocab_size=40, minloglevel=2)
    (file,) = (checkpoint / "model/text").glob("*.model")
    file.write_bytes(content.getvalue())
    said = refused(capsys, checkpoint, tmp_path / "out")
    assert "is not what was written" in said  # a checkpoint's files have hashes
    (tmp_path / "small").mkdir()
    (tmp_path / "small/sentencepiece.bpe.model").write_bytes(content.getvalue())
    small = Tokenizer.from_file(tmp_path / "small")
    assert small.vocab_size != tokenizer.vocab_size
    (checkpoint / "model/text/tokenizer.json").unlink()
    assert "has another tokenizer than" in refused(capsys, checkpoint / "model", tmp_path / "out")
    config = checkpoint / "model/text/config.json"
    said = json.loads(config.read_text())
    del said["trilith"]["tokenizer_fingerprint"]  # a model that was saved by an earlier release
    config.write_text(json.dumps(said))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = refused(capsys, checkpoint / "model", tmp_path / "out")
    assert f"the tokenizer has {small.vocab_size} tokens and the text tower {tokenizer.vocab_size}" in said
    file.unlink()
    assert "has no tokenizer" in refused(capsys, checkpoint / "model", tmp_path / "out")


@pytest.mark.filterwarnings("ignore:layer_norm_eps")
def test_what_no_other_library_can_be_told_is_refused_by_name_and_goes_alone(make_model, save, tmp_path, capsys):
    save(tmp_path / "stage1", make_model(vision={"layer_norm_eps": 1e-5}))
    said = refused(capsys, tmp_path / "stage1", tmp_path / "out")
    assert "layer_norm_eps is 1e-05, and timm's EVA02 models" in said
    assert "`--format trilith` writes it" in said
    assert main(["export", str(tmp_path / "stage1"), str(tmp_path / "alone"), "--format", "trilith"]) == 0
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {"config.json", "text", "vision"}


def test_a_full_disk_leaves_nothing(checkpoint, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vision_tower.files.save_file", full)
    assert "No space left on device; free some space" in refused(capsys, checkpoint, tmp_path / "out")
    assert at(checkpoint).damage() is None
