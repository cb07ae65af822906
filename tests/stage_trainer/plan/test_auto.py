"""What `gradient_cache: auto` chooses, on devices that are made up for it."""

import dataclasses
import json

import pytest
import torch
from data_prep.shards import DatasetWriter
from stage_trainer.plan import auto
from stage_trainer.plan.devices import DEVICES, GIB
from stage_trainer.plan.lengths import Counted, Lengths
from stage_trainer.plan.memory import Setting, Sizes
from stage_trainer.plan.planner import Cluster, Segment, model_of, with_chunks
from stage_trainer.recipe import GradientCache
from stage_trainer.recipe.read import load
from stage_trainer.tasks import make_task

CUDA = torch.device("cuda")
CARD = dataclasses.replace(DEVICES["h100-80gb"], launch=0.0)
SHORT = Lengths(12, 12, "")


@pytest.fixture
def drawn(recipes):
    """The drawn recipe with large batches and without data."""

    def read(*settings):
        given = ["corpus=nowhere", "optimizer.name=adamw", "batch={image_text: 512, text: 512}", "gradient_cache=auto"]
        return load(recipes / "drawn.yaml", [*given, "resolution=[[0, 40]]", *settings], 1).recipe

    return read


def decide(recipe, memory, device=CARD, lengths=(SHORT, SHORT)):
    return auto.decide(recipe, 1, range(200), Cluster(device), int(memory), lengths)


@pytest.fixture
def needed(drawn):
    """Bytes that the drawn batch needs at once, without checkpointing and with it."""
    both = drawn("model.text.checkpointing=true", "model.vision.checkpointing=true")
    return decide(drawn(), 64 * GIB).planned / 0.95, decide(both, 64 * GIB).planned / 0.95


def test_what_fits_at_once_is_run_at_once_without_checkpointing(drawn):
    choice = decide(drawn(), 64 * GIB)
    assert choice.setting == Setting()
    assert choice.seconds > 0
    assert "auto is none here, without checkpointing; predicted" in choice.line


def test_a_little_less_memory_asks_for_checkpointing_before_chunks(drawn, needed):
    plain, checkpointed = needed
    assert checkpointed < plain
    choice = decide(drawn(), plain * 0.99)
    assert choice.setting == Setting(None, True, True)
    assert "with checkpointing" in choice.line
    assert "chunks of" in choice.line, "the runner-up is said"


def test_little_memory_asks_for_chunks_and_they_do_without_checkpointing(drawn, needed):
    choice = decide(drawn(), needed[1] / 2)
    assert isinstance(choice.cache, GradientCache)
    assert not choice.setting.checkpointing_image
    assert choice.planned <= needed[1] / 2
    assert "at once" in choice.line


def test_very_little_memory_asks_for_checkpointing_where_small_chunks_are_slower_than_recomputation(drawn, needed):
    memory = needed[1] / 5.6  # the images, all of them on the device, take a tenth of it
    # Only products count, whatever their size.
    starved = dataclasses.replace(CARD, fp32=1e9, bf16=1e9, fp16=1e9, bandwidth=1e18, cores=0)
    quick, slow = (decide(drawn(), memory, device) for device in (CARD, starved))
    assert quick.setting.checkpointing_image
    assert quick.setting.checkpointing_text
    assert not slow.setting.checkpointing_image
    assert quick.cache.images > slow.cache.images


def test_what_the_recipe_says_of_checkpointing_stands(drawn, needed):
    with_it = drawn("model.text.checkpointing=true", "model.vision.checkpointing=true")
    assert decide(with_it, 64 * GIB).setting == Setting(None, True, True)
    without = drawn("model.text.checkpointing=false", "model.vision.checkpointing=false")
    choice = decide(without, needed[0] * 0.99)
    assert choice.cache
    assert not choice.setting.checkpointing_image
    one = drawn("model.vision.checkpointing=false")
    assert decide(one, needed[0] * 0.99).setting.checkpointing_image is False


def test_the_runners_up_are_slower(drawn, needed, monkeypatch):
    timed = []
    predict = auto.predict
    monkeypatch.setattr(auto, "predict", lambda *given: timed.append(predict(*given)) or timed[-1])
    choice = decide(drawn(), needed[1] / 2)
    assert len(timed) == 4
    assert choice.seconds == pytest.approx(min(t.total for t in timed[2:])), "what does not fit counts for nothing"


def test_nothing_fits_and_that_is_said(drawn):
    choice = decide(drawn(), 4 * 2**20)
    assert "may be too much" in choice.line


def test_without_a_speed_the_largest_chunks_are_taken_and_checkpointing_is_the_recipes(drawn, needed):
    """On a CPU: this is what the golden curves and the quickstart rest on."""
    unknown = dataclasses.replace(CARD, kind="cpu", bandwidth=None)
    roomy = decide(drawn(), 64 * GIB, unknown)
    assert (roomy.setting, roomy.seconds) == (Setting(), None)
    tight = decide(drawn(), roomy.planned / 4, unknown)
    assert not tight.setting.checkpointing_image
    twice = dataclasses.replace(tight.cache, images=2 * tight.cache.images)
    recipe = drawn("gradient_cache=" + json.dumps(dataclasses.asdict(twice)))
    assert decide(recipe, roomy.planned / 4, unknown).planned > roomy.planned / 4 * 0.95
    assert "predicted" not in tight.line


def test_sizes_of_the_recipe_are_timed_as_they_are(drawn):
    choice = decide(drawn("gradient_cache={images: 64, tokens: 700}"), 64 * GIB)
    assert choice.cache == GradientCache(images=64, tokens=700)
    assert choice.seconds > decide(drawn(), 64 * GIB).seconds


def test_memory_counts_the_longest_batch_and_time_the_usual_one(drawn):
    recipe = drawn("max_tokens=48")
    long = Lengths(48, 48, "")
    usual, mixed, worst = (
        decide(recipe, 64 * GIB, CARD, pair) for pair in ((SHORT, SHORT), (SHORT, long), (long, long))
    )
    assert usual.planned < mixed.planned == worst.planned
    assert usual.seconds == mixed.seconds < worst.seconds


def test_a_task_that_rests_makes_no_chunks_small(drawn):
    segment = Segment(0, 200, 40, 0.0, ("text",))
    model = model_of(drawn(), 1, segment, "bf16")
    sizes = Sizes(images=0, texts=1024, length=12, pairs=512, negatives=0, ranks=1)
    assert with_chunks(model, sizes, Setting(), CARD, 64 * GIB).cache.images == 1024


def write_texts(corpus, words):
    """Triplets of texts of so many words."""
    with DatasetWriter(corpus / "train/text-pairs/made", kind="text-pairs", source="made") as writer:
        for number, count in enumerate(words):
            text = [{"text": "word " * count, "language": "en"}]
            content = json.dumps({"query": text, "target": text}).encode()
            writer.write(f"t{number}", {"json": content}, languages=["en"], tokens=count)


def test_real_lengths_let_a_batch_fit_that_would_not_with_the_longest_texts(drawn, tmp_path, monkeypatch):
    """Without a tokenizer, by the sidecars' counts of tokens."""
    monkeypatch.setattr("stage_trainer.plan.lengths._tokenizer", lambda model: None)
    write_texts(tmp_path, [8, 12] * 100)
    settings = "max_tokens=64", f"corpus={tmp_path}", "data.text=[{path: text-pairs/made}]", "batch={text: 2048}"
    recipe = drawn(*settings, "task_start={}", "data.image_text=[]")
    usual, longest = auto._agreed_lengths(recipe, recipe.stage(1), 1, CUDA)
    assert usual.texts == 10
    assert usual.squares == pytest.approx((8**2 + 12**2) / 2 / 10**2)
    assert 12.5 < longest.texts < 20
    unread = drawn(*settings[:1], "data.text=[{path: text-pairs/absent}]", settings[3], "data.image_text=[]")
    assert [found.texts for found in auto._agreed_lengths(unread, unread.stage(1), 1, CUDA)] == [32, 64]
    known, unknown = (decide(r, 64 * GIB, CARD, auto._agreed_lengths(r, r.stage(1), 1, CUDA)) for r in (recipe, unread))
    assert known.planned < unknown.planned / 2
    between = (known.planned + unknown.planned) / 2
    assert decide(recipe, between, CARD, (usual, longest)).setting == Setting()


def test_few_samples_say_nothing_of_the_longest_batch():
    few, many = (Counted(None, 10.0, 100.0, samples, 0.0, "") for samples in (31, 32))
    lengths = Lengths(10, 10, "", counted={"image_text": [many], "text": [many, few]})
    most = lengths.most(77, 100, 100)
    assert (most.captions, most.texts) == (12.5, 77)
    assert Lengths(10, 10, "", counted={"image_text": [many], "text": [None]}).most(77, 100, 100).texts == 77


def test_on_a_cpu_texts_are_as_long_as_they_may_be(drawn):
    recipe = drawn("max_tokens=48")
    assert [of.texts for of in auto._agreed_lengths(recipe, recipe.stage(1), 1, torch.device("cpu"))] == [48, 48]


def test_what_cannot_be_counted_is_an_error_on_every_rank(drawn, monkeypatch):
    def broken(*_):
        raise ValueError("broken")

    monkeypatch.setattr(auto, "text_lengths", broken)
    with pytest.raises(RuntimeError, match="first rank") as raised:
        auto._agreed_lengths(drawn(), drawn().stage(1), 1, CUDA)
    assert "broken" in str(raised.value.__cause__)


def test_a_gpu_that_is_not_in_the_table_is_timed_as_the_most_alike_one(drawn, monkeypatch):
    monkeypatch.setattr(auto, "present", lambda where: None)
    monkeypatch.setattr(auto, "free_memory", lambda where: 64 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: (8, 9))
    choice = auto.choose(drawn(), 1, 0, 200, CUDA)
    assert choice.setting == Setting()
    assert choice.seconds > 0
    assert "on l40s, the most alike of the devices whose speed is known" in choice.line
    monkeypatch.setattr(auto, "present", lambda where: DEVICES["rtx-4090"])
    assert "on rtx-4090;" in auto.choose(drawn(), 1, 0, 200, CUDA).line


def test_the_choice_is_set_on_the_model(drawn):
    task = make_task(drawn(), 1)
    model = task.empty_model()
    auto.Choice(Setting(None, True, False), 0, "").configure(model)
    assert (model.vision.config.checkpointing, model.text.config.checkpointing) == (True, False)
