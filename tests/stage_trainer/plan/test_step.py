"""The predicted time of a step: its parts against formulas, and what has to make it longer."""

from dataclasses import replace

import pytest
from stage_trainer.plan.devices import DEVICES, Device
from stage_trainer.plan.memory import Model, Setting, Sizes, estimate
from stage_trainer.plan.roofline import ATTENTION, ELEMENTWISE, LAUNCHES, MEMORY, PRODUCTS
from stage_trainer.plan.step import COMMUNICATION, COPIES, HOST_LINK, LOSS, OPTIMIZER, PARTS, exchanged, predict
from stage_trainer.recipe import GradientCache, Trainable
from text_tower import TextTowerConfig
from vision_tower import VisionTowerConfig

H100 = replace(DEVICES["h100-80gb"], launch=0.0)
"""It does not wait for the host: towers as small as these would else take as long as that."""
WIDTH, LEARNING = 128, 10**8
MODEL = Model(
    TextTowerConfig(vocab_size=500, width=WIDTH, layers=5, heads=2, mlp_width=512),
    VisionTowerConfig(resolution=64, patch=8, width=WIDTH, layers=6, heads=2),
    Trainable(), 0.0, "bf16", "adamw", (128, 64), weights=LEARNING, learning=LEARNING, largest=500 * WIDTH, matrices=0,
)  # fmt: skip
SIZES = Sizes(images=64, texts=192, length=24, pairs=64, negatives=0, ranks=1)
CHUNKS = GradientCache(images=16, tokens=48 * 24)


def parts(model=MODEL, sizes=SIZES, setting=None, device=H100, link=None):
    found = predict(model, sizes, setting or Setting(), device, link)
    assert tuple(name for name, _ in found.parts) == PARTS
    assert found.total == pytest.approx(sum(dict(found.parts).values()))
    return dict(found.parts)


def total(**given):
    return sum(parts(**given).values())


@pytest.mark.parametrize(
    "more",
    [
        {"sizes": replace(SIZES, length=48)},
        {"sizes": replace(SIZES, images=128)},
        {"sizes": replace(SIZES, texts=256)},
        {"sizes": replace(SIZES, images=256, image_negatives=3)},
        {"model": replace(MODEL, precision="fp32")},
        {"model": replace(MODEL, learning=2 * LEARNING)},
        {"setting": Setting(CHUNKS)},
        {"setting": Setting(checkpointing_image=True)},
        {"setting": Setting(checkpointing_text=True)},
        {"setting": Setting(zero=1)},
        {"device": replace(H100, bandwidth=H100.bandwidth / 2)},
        {"device": replace(H100, launch=1e-3)},
        {"device": replace(DEVICES["h100-pcie-80gb"], launch=0.0)},
    ],
    ids=lambda more: next(iter(more)),
)
def test_more_to_do_or_a_slower_device_take_longer(more):
    assert total(**more) > total()


def test_a_compiled_step_takes_less():
    text, vision = replace(MODEL.text, compile=True), replace(MODEL.vision, compile=True)
    before, after = parts(), parts(model=replace(MODEL, text=text, vision=vision))
    assert before[PRODUCTS] == after[PRODUCTS]
    assert before[MEMORY] > after[MEMORY]
    assert before[LAUNCHES] > after[LAUNCHES]


def test_a_residual_stream_in_16_bits_takes_less_time_and_memory():
    text, vision = (replace(tower, residual_in_fp32=False) for tower in (MODEL.text, MODEL.vision))
    models = MODEL, replace(MODEL, text=text, vision=vision)
    before, after = (parts(model=model) for model in models)
    assert before[PRODUCTS] == after[PRODUCTS]
    assert before[MEMORY] > 1.1 * after[MEMORY]
    sizes = replace(SIZES, images=4096, texts=8192)
    kept = [estimate(model, sizes, Setting(), H100).parts["activations"] for model in models]
    assert kept[0] > 1.1 * kept[1]


def test_twice_as_many_chunks_take_the_towers_twice_as_long():
    setting = Setting(CHUNKS, zero=3)  # under which they share no casts of weights
    once, twice = (parts(sizes=replace(SIZES, images=16 * n, texts=48 * n), setting=setting) for n in (2, 4))
    for part in (PRODUCTS, ATTENTION, MEMORY):
        assert twice[part] == pytest.approx(2 * once[part])


def test_chunks_share_the_casts_of_weights_but_under_zero_3():
    """Each of these Linears' numbers is read in float32 and written in bfloat16 once a step; in each pass otherwise."""
    once, each = (parts(setting=Setting(CHUNKS, zero=zero)) for zero in (1, 3))
    text, vision = MODEL.text, MODEL.vision
    numbers = text.layers * WIDTH * (4 * WIDTH + 2 * text.mlp_width)
    numbers += vision.layers * WIDTH * (4 * WIDTH + 3 * vision.mlp_width)
    casts = 6 * numbers / (H100.bandwidth * H100.stream * ELEMENTWISE)
    passes = 2 * 4
    assert each[MEMORY] - once[MEMORY] == pytest.approx((passes - 1) * casts, rel=0.2)
    kept = [estimate(MODEL, SIZES, Setting(CHUNKS, zero=zero), H100).parts["weights"] for zero in (1, 3)]
    assert kept[0] == pytest.approx(4 * 2 * LEARNING, rel=0.05)


def test_a_last_chunk_that_is_smaller_is_counted():
    times = [total(sizes=replace(SIZES, images=n), setting=Setting(CHUNKS)) for n in (16, 24, 32)]
    assert times == sorted(set(times))


def test_long_texts_among_short_ones_make_attention_longer():
    usual, mixed = (parts(sizes=replace(SIZES, images=0, squares=squares)) for squares in (1.0, 3.0))
    assert mixed[ATTENTION] == pytest.approx(3 * usual[ATTENTION])


def test_ranks_exchange_embeddings_gradients_and_weights():
    link, ranks = 100e9, 8
    sizes = replace(SIZES, ranks=ranks)
    sent = 2 * 4 * LEARNING + 2 * 4 * (64 + 64) * ranks * WIDTH
    assert parts(sizes=sizes, link=link)[COMMUNICATION] == pytest.approx(sent * 7 / 8 / link)
    assert parts(sizes=sizes)[COMMUNICATION] == 0
    assert parts(link=link)[COMMUNICATION] == 0
    zero3 = parts(sizes=sizes, setting=Setting(CHUNKS, zero=3), link=link)[COMMUNICATION]
    assert zero3 == pytest.approx((sent + 3 * 4 * 4 * LEARNING) * 7 / 8 / link), "four chunks, thrice each"


def test_the_update_moves_weights_gradients_and_moments():
    speed = H100.bandwidth * H100.stream * ELEMENTWISE
    assert parts()[OPTIMIZER] == pytest.approx((28 + 12) * LEARNING / speed, rel=0.01)
    sharing = parts(sizes=replace(SIZES, ranks=8), setting=Setting(zero=1))[OPTIMIZER]
    assert sharing == pytest.approx((40 / 8 + 16) * LEARNING / speed, rel=0.01)


def test_muon_pays_for_its_products():
    shapes = ((1024, 4096),) * 10
    muon = replace(MODEL, optimizer="muon", muon_shapes=shapes)
    least = 10 * 5 * (4 * 1024**2 * 4096 + 2 * 1024**3) / (H100.bf16 * H100.products)
    more = parts(model=muon)[OPTIMIZER] - parts()[OPTIMIZER]
    assert least < more < 3 * least


def test_the_loss_multiplies_all_queries_with_the_ranks_own_targets():
    pairs, ranks = 2048, 8
    loss = parts(sizes=replace(SIZES, pairs=pairs, images=0, ranks=ranks))[LOSS]
    operations = 4 * 2 * (pairs * ranks) * pairs * max(MODEL.dims)
    assert operations / H100.bf16 < loss < 2.5 * operations / H100.bf16  # `model.precision`, as in training


def test_images_are_sent_to_a_gpu_once():
    assert parts()[COPIES] == pytest.approx(64 * (3 * 64 * 64 + 8) / HOST_LINK)
    assert parts(setting=Setting(CHUNKS))[COPIES] == pytest.approx(parts()[COPIES] / 4)  # the others' go on beside it
    cpu = replace(H100, kind="cpu")
    assert parts(device=cpu)[COPIES] == 0


def test_what_is_frozen_is_not_differentiated():
    frozen = replace(MODEL, trainable=Trainable("none", "all"))
    assert parts(model=frozen)[PRODUCTS] < parts()[PRODUCTS] * 0.8


def test_no_time_without_a_speed():
    assert predict(MODEL, SIZES, Setting(), Device("cpu", 2**33, 1.0, None, 1.0, None, kind="cpu"), None) is None


def test_ranks_send_captions_but_no_hard_negatives():
    """Each keeps its own, and gathers the others' captions (`contrastive_losses`)."""
    many = replace(SIZES, images=4 * 64, image_negatives=3, ranks=8)
    name = "embeddings and their gradients"
    assert exchanged(MODEL, many, Setting())[name] == exchanged(MODEL, replace(SIZES, ranks=8), Setting())[name]
