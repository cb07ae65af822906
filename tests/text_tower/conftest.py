"""A small tower, packed batches, and a sentencepiece model of thirty languages."""

import io
import json
from pathlib import Path

import pytest
import torch
from text_tower import PackedTokens, TextTower, TextTowerConfig, Tokenizer

LORA = {"lora_rank": 4, "lora_alpha": 6.0, "adapters": ("retrieval.query", "separation")}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def make_tower():
    """Builds a small tower whose every parameter, biases and adapters too, is random and large enough to matter."""

    def make(seed=0, tokenizer=None, **changes):
        shape = {"vocab_size": 600, "width": 32, "layers": 3, "heads": 4, "mlp_width": 48, "max_length": 512}
        tower = TextTower(TextTowerConfig(**{**shape, **changes}), tokenizer)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in tower.named_parameters():
                norm_weight = "norm" in name or "_ln" in name
                parameter.normal_(float(norm_weight and name.endswith("weight")), 0.3, generator=generator)
        return tower

    return make


@pytest.fixture
def pack():
    """Packs sequences of the given lengths, of random ids without special ones."""

    def pack(lengths, seed=1, vocab_size=600):
        generator = torch.Generator().manual_seed(seed)
        return PackedTokens.from_lists(
            [torch.randint(4, vocab_size, (length,), generator=generator).tolist() for length in lengths]
        )

    return pack


@pytest.fixture
def padded_mean():
    """Mean-pooled embeddings of a padded transformers model, for packed tokens."""

    def padded_mean(model, packed):
        sequences = packed.ids.split(list(packed.lengths))
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=1)
        mask = torch.arange(ids.shape[1]) < torch.tensor(packed.lengths)[:, None]
        hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))  # as ours, which pools in float32
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    return padded_mean


@pytest.fixture(scope="session")
def sentences() -> dict[str, str]:
    """Article 1 of the Universal Declaration of Human Rights in the thirty languages."""
    return json.loads(Path(__file__).with_name("languages.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def spm_file(sentences, tmp_path_factory) -> Path:
    """A unigram model of 480 pieces; rare characters are left out, so that <unk> occurs."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(list(sentences.values()) * 3),
        model_writer=model,
        vocab_size=480,
        character_coverage=0.995,
        minloglevel=2,
    )
    file = tmp_path_factory.mktemp("spm") / "sentencepiece.bpe.model"
    file.write_bytes(model.getvalue())
    return file


@pytest.fixture(scope="session")
def tokenizer(spm_file) -> Tokenizer:
    return Tokenizer.from_file(spm_file)


@pytest.fixture
def lora() -> dict:
    return dict(LORA)
