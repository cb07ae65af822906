"""What a plan says of a recipe, and that `gradient_cache: auto` follows it."""

import dataclasses
import json
import re

import pytest
import torch
from data_prep.shards import DatasetWriter
from stage_trainer.cli import main
from stage_trainer.data.config import DataConfig
from stage_trainer.errors import UserError
from stage_trainer.plan import auto
from stage_trainer.plan.devices import DEVICES, GIB, Device, device, peak_flops, read_bytes
from stage_trainer.plan.flops import StepShape, kept_patches, text_flops, vision_flops
from stage_trainer.plan.hard_negatives import TRIPLETS, hard_negatives
from stage_trainer.plan.machines import load_of
from stage_trainer.plan.memory import Setting
from stage_trainer.plan.planner import Cluster, model_of, plan_stage, segments
from stage_trainer.plan.step import exchanged
from stage_trainer.plan.table import WIDTH, describe, stage_table
from stage_trainer.recipe import GradientCache
from stage_trainer.recipe.read import load

MIB = 2**20


@pytest.fixture
def drawn(recipes):
    """The drawn recipe without data, so that lengths are assumed."""

    def read(*settings, stage=1):
        return load(recipes / "drawn.yaml", ["corpus=nowhere", "optimizer.name=adamw", *settings], stage).recipe

    return read


def gpu(mebibytes: float, ranks: int = 1) -> Cluster:
    """A card of which so much is usable."""
    cluster = Cluster(DEVICES["rtx-4090"], ranks)
    lost = cluster.device.memory - cluster.usable / 0.95
    return Cluster(dataclasses.replace(cluster.device, memory=int(mebibytes * MIB / 0.95 + lost)), ranks)


def test_segments_are_cut_where_anything_changes(drawn):
    stage = drawn("task_start={image_text: 50}", "patch_dropout=[[0, 0.25], [160, 0.0]]").stage(1)
    assert [(s.start, s.stop, s.resolution, s.patch_dropout, s.tasks) for s in segments(stage)] == [
        (0, 50, 32, 0.25, ("text",)),
        (50, 160, 32, 0.25, ("image_text", "text")),
        (160, 200, 40, 0.0, ("image_text", "text")),
    ]


def test_the_cheapest_way_that_fits_is_taken_first(drawn):
    recipe = drawn("batch={image_text: 512, text: 512}", "resolution=[[0, 40]]", "patch_dropout=[[0, 0.0]]")
    plan = plan_stage(recipe, 1, gpu(10_000)).deciding
    at_once = plan.best
    assert at_once is plan.tried[0]
    assert at_once.setting.cache is None
    assert not at_once.setting.checkpointing_image
    plan = plan_stage(recipe, 1, gpu(at_once.memory.total / MIB - 1)).deciding
    assert plan.best.setting.checkpointing_image
    assert plan.best.setting.cache is None
    plan = plan_stage(recipe, 1, gpu(plan.best.memory.total / MIB - 1)).deciding
    chunked = plan.best
    assert chunked.setting.cache
    assert not chunked.setting.checkpointing_image
    assert chunked.memory.total <= gpu(0).usable + plan.tried[1].memory.total
    assert chunked.flops.model == at_once.flops.model
    assert chunked.flops.recomputed > at_once.flops.recomputed


def test_a_model_that_cannot_fit_is_said_not_to(drawn):
    plan = plan_stage(drawn(), 1, gpu(1)).deciding
    assert plan.best is None
    assert [option.setting.zero for option in plan.tried] == [0] * 4


def test_more_ranks_have_smaller_parts_and_the_same_work(drawn):
    one, four = (plan_stage(drawn(), 1, gpu(10_000, ranks)).segments[0] for ranks in (1, 4))
    assert one.sizes.images == 4 * four.sizes.images
    assert one.tried[0].flops == four.tried[0].flops
    assert one.seconds(one.tried[0], gpu(1)) / 4 < four.seconds(four.tried[0], gpu(1, 4))


@pytest.mark.parametrize(("kind", "found"), [("text-triplets", 3), ("text-pairs", 0)])
def test_hard_negatives_are_those_of_the_data_whatever_its_folder_is_called(drawn, tmp_path, kind, found):
    text = [{"text": "a", "language": "en"}]
    for folder in ("mine", "text-triplets"):
        with DatasetWriter(tmp_path / "train" / folder / "made", kind=kind, source="made") as writer:
            sample = json.dumps({"query": text, "target": text, "negatives": [text] * found}).encode()
            writer.write("s0", {"json": sample}, languages=["en"], tokens=None)
        recipe = drawn(f"corpus={tmp_path}", f"data.text=[{{path: {folder}/made}}]")
        assert hard_negatives(DataConfig.of(recipe), recipe.stage(1)) == (found, 0)
    absent = drawn("data.text=[{path: text-triplets/absent}]")
    assert hard_negatives(DataConfig.of(absent), absent.stage(1)) == (TRIPLETS, 0)


def test_hard_negative_images_are_computed_decoded_and_fetched(drawn, tmp_path, png):
    """Those of the data, or seven where it is not here; as if the captions had so many images more."""
    sample = {"png": png, "negative-0.png": png, "negative-1.png": png, "txt": b"a"}
    with DatasetWriter(tmp_path / "train/mine", kind="image-triplets", source="mine") as writer:
        writer.write("s0", sample, languages=["en"], tokens=None)
    cluster, loads = Cluster(DEVICES["h100-80gb"]), []
    settings = ("resolution=[[0, 32]]", "loss.dims=[64]", "batch={image_text: 16, text: 0}")
    for negatives, more in (
        (0, ()),
        (2, (f"corpus={tmp_path}", "data.image_text=[{path: mine}]")),
        (TRIPLETS, ("data.image_text=[{path: image-triplets/absent}]",)),
    ):
        recipe = drawn(*settings, *more)
        assert hard_negatives(DataConfig.of(recipe), recipe.stage(1)) == (0, negatives)
        plan = plan_stage(recipe, 1, cluster)
        (part,) = plan.segments
        assert part.sizes.images == 16 * (1 + negatives)
        assert part.sizes.texts == 16
        model = model_of(recipe, 1, part.segment, plan.precision)
        kept = kept_patches(model.vision, part.segment.patch_dropout)
        shape = StepShape(16 * (1 + negatives), kept, 16, 16 * part.sizes.length, 16 * part.sizes.length**2)
        towers = vision_flops(model.vision, shape).model + text_flops(model.text, shape, "all").model
        products = 16 * 16 * (1 + negatives) * 64
        assert part.as_written.flops.model == towers + 3 * 2 * products
        load, seconds = load_of(recipe, plan, part, cluster), part.seconds(part.as_written, cluster)
        loads.append((load.images * seconds, load.fetched * seconds))
    assert [images for images, _ in loads] == pytest.approx([16, 48, 128])
    assert loads[2][1] == pytest.approx(8 * loads[0][1])


def test_a_relational_teacher_is_counted_and_the_loss_that_it_replaces_is_not(drawn):
    batch, narrow = "batch={image_text: 1024, text: 2048}", "loss.dims=[16]"
    teacher = "model: a, folder: b, loss: relational, language: en"
    plans = [
        plan_stage(drawn(batch, narrow, *more), 1, gpu(100, 2)).segments[0]
        for more in (
            (), (f"teacher={{{teacher}}}",), (f"teacher={{{teacher}, alone: true}}",),
            (f"teacher={{{teacher}, of: [images, captions, texts], alone: true}}",),
        )
    ]  # fmt: skip
    assert [part.sizes.taught for part in plans] == [(), (2048,), (2048,), (1024, 2048)]
    assert [part.sizes.replaced for part in plans] == [(), (), ("text",), ("image_text", "text")]
    none, beside, alone, _ = (part.as_written for part in plans)
    width = 64  # of the drawn towers
    assert beside.flops.model - none.flops.model == 3 * 2 * 4096**2 * width
    assert beside.flops.model - alone.flops.model == 3 * 2 * 2048**2 * 16
    model = model_of(drawn(batch), 1, plans[0].segment, "bf16")
    moved = [exchanged(model, part.sizes, part.as_written.setting) for part in plans]
    rows = [each["embeddings and their gradients"] // (2 * 4 * 2 * width) for each in moved]
    assert rows == [512 + 1024, 512 + 1024 + 2048, 512 + 2048, 1024 + 2048]
    assert beside.memory.total > none.memory.total + 4 * 2048 * 4096


def test_masked_language_modelling_is_not_planned(recipes):
    recipe = load(recipes / "masked-lm.yaml").recipe
    with pytest.raises(UserError, match="masked-language-model"):
        plan_stage(recipe, 1, gpu(100))


def test_the_command_needs_neither_gpu_nor_data(capsys, recipes):
    arguments = ["--recipe", str(recipes / "drawn.yaml"), "--stage", "1", "--gpus", "2", "--gpu", "l4", "--price", "1"]
    assert main(["plan", *arguments, "corpus=nowhere", "optimizer.name=adamw"]) == 0
    printed, told = capsys.readouterr()
    assert told.splitlines()[0] == "loading PyTorch …"
    assert "stage 1, steps 0 to 160 (1 of 2): trying way 1" in told, "a minute of silence looks like a hang"
    for words in (
        "drawn on 2 × l4",
        "half of max_tokens (assumed",
        "at once",
        "activations",
        "recomputed",
        "device hours",
        "predicted, not measured",
        "bound by",
        "matrix products",
    ):
        assert words in printed
    assert main(["plan", *arguments[:-4], "--gpu", "h100", "corpus=nowhere"]) == 2
    assert "did you mean 'h100" in capsys.readouterr().err


def test_labels_of_any_length_keep_clear_of_the_numbers_and_lines_end_within_the_width(drawn):
    recipe = drawn("model.text.checkpointing=true", "max_tokens=128", "resolution=[[0, 32]]", "patch_dropout=[[0, 0]]")
    cluster = dataclasses.replace(gpu(10_000), price=1234.5)
    plan = plan_stage(recipe, 1, cluster)
    (segment,) = plan.segments
    assert "not known how many texts max_tokens 128 cuts" in stage_table(plan, cluster)
    row = re.compile(r" {4,}(\S.*?) {2,}(\d+\.\d\d [GM]iB)  (yes|no) +[\d.e-]+ +[\d,]+ +\d+%")
    for images, tokens in ((256, 16384), (4096, 131072), (10**9, 10**12), (10**20, 10**20)):
        setting = Setting(GradientCache(images=images, tokens=tokens), False, True, 3)
        written = dataclasses.replace(segment.as_written, setting=setting)
        longer = dataclasses.replace(plan, segments=(dataclasses.replace(segment, as_written=written),))
        lines = stage_table(longer, cluster).splitlines()
        rows = [match for line in lines if (match := row.fullmatch(line))]
        assert len(rows) == 1 + len(segment.tried)
        assert len({match.end(2) for match in rows}) == 1, "numbers stand below one another"
        assert max(map(len, lines)) <= WIDTH
        assert f"the recipe's: {describe(setting)}" in " ".join("\n".join(lines).replace(rows[0][2], "").split())


def test_own_figures_replace_the_tables():
    found = device("rtx-4090", memory="20 GiB", peak=1e14)
    assert (found.memory, found.peak("bf16"), found.peak("fp32")) == (20 * GIB, 1e14, 1e14)
    assert device("t4").precision("auto") == "fp32"
    assert read_bytes("80GB") == 80 * 10**9
    with pytest.raises(UserError, match="24GiB"):
        read_bytes("much")


def test_peaks_are_dense_and_known_by_torchs_name(monkeypatch):
    assert peak_flops(torch.device("cpu"), "fp32") is None
    for name, expected in (("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA GeForce RTX 4090 Laptop GPU", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(torch.device("cuda"), "bf16") == expected
    assert all(d.fp32 < d.fp16 for d in DEVICES.values())


def choose(monkeypatch, recipe, memory):
    monkeypatch.setattr(auto, "free_memory", lambda _: int(memory))
    return auto.choose(recipe, 1, 0, 200, torch.device("cpu"))


def test_auto_caches_only_what_does_not_fit(monkeypatch, drawn):
    recipe = drawn("gradient_cache=auto", "batch={image_text: 512, text: 512}")
    roomy = choose(monkeypatch, recipe, 64 * GIB)
    assert roomy.cache is None
    assert "auto is none" in roomy.line
    tight = choose(monkeypatch, recipe, roomy.planned / 4)
    assert isinstance(tight.cache, GradientCache)
    assert tight.planned <= roomy.planned / 4
    assert f"chunks of {tight.cache.images} images" in tight.line
    hopeless = choose(monkeypatch, recipe, 4 * MIB)
    assert "may be too much" in hopeless.line


def test_sizes_that_the_recipe_gives_stand(monkeypatch, drawn):
    recipe = drawn("gradient_cache={images: 5, tokens: 70}")
    assert choose(monkeypatch, recipe, 64 * GIB).cache == GradientCache(images=5, tokens=70)


def test_the_rank_with_least_memory_decides(monkeypatch):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        assert auto._least(123 * MIB, torch.device("cpu")) == (4, 123 * MIB)
    finally:
        torch.distributed.destroy_process_group()


def test_auto_is_refused_where_it_means_nothing(recipes):
    with pytest.raises(UserError, match="for stages of pairs"):
        load(recipes / "masked-lm.yaml", ["gradient_cache=auto"], 1)
    with pytest.raises(UserError, match="gradient_cache"):
        load(recipes / "drawn.yaml", ["gradient_cache=always"], 1)


def test_planned_stands_beside_measured(monkeypatch):
    assert auto.planned_and_measured(GIB, torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 2 * GIB)
    line = auto.planned_and_measured(GIB, torch.device("cuda"))
    assert line == "peak memory of a rank: planned 1.00 GiB, measured 2.00 GiB (-50%)"
    assert Device("cpu", 1, None, None, None, None, kind="cpu").peak("bf16") is None


def test_a_loader_that_is_too_slow_bounds_the_step(drawn):
    recipe = drawn("batch={image_text: 512, text: 512}", "resolution=[[0, 40]]", "patch_dropout=[[0, 0.0]]")
    cluster = dataclasses.replace(gpu(10_000), loader=1.0)
    plan = plan_stage(recipe, 1, cluster)
    (segment,) = plan.segments
    assert segment.seconds(segment.best, cluster) == 512
    assert segment.seconds(segment.best, gpu(10_000)) == segment.best.time.total < 1
    table = stage_table(plan, cluster)
    assert "512 s, bound by waiting for data" in table
    assert re.search(r"512 s  100%  waiting for data", table)
    assert "waiting for data" not in stage_table(plan, gpu(10_000))


def test_ranks_of_several_machines_exchange_over_the_network():
    card = DEVICES["h100-80gb"]
    assert Cluster(card, 8).link == card.link
    assert Cluster(card, 16).link == 50e9
    assert Cluster(card, 16, network=1e15).link == card.link
    assert Cluster(dataclasses.replace(card, link=None), 4, machine=2).link == 50e9
    assert Cluster(dataclasses.replace(card, link=None), 2, machine=2).link is None


def test_a_device_without_known_speed_gets_no_times_and_own_figures_give_them(drawn):
    cpu = device("cpu", memory="10GiB")
    plan = plan_stage(drawn(), 1, Cluster(cpu))
    assert plan.segments[0].best.time is None
    assert "bound by" not in stage_table(plan, Cluster(cpu))
    assert (
        plan_stage(drawn(), 1, Cluster(device("cpu", memory="10GiB", peak=1e11, bandwidth=1e10))).segments[0].best.time
    )


def test_products_in_8_bits_are_predicted_where_there_are_any(drawn):
    """Blocks 1,024 wide, compiled: faster by products, slower by what rounds; weights are held in 8 bits, too."""
    towers = [
        f"model.{tower}.{item}" for tower in ("text", "vision") for item in ("width=1024", "heads=16", "compile=true")
    ]
    shape = ["model.text.mlp_width=4096", "model.vision.patch=14", "resolution=[[0, 224]]", "loss.dims=[1024]"]
    more = [*towers, *shape, "precision=bf16", "batch={image_text: 256, text: 128}", "patch_dropout=[[0, 0.5]]"]
    plans = {fp8: plan_stage(drawn(*more, f"fp8={fp8}"), 1, Cluster(DEVICES["h100-80gb"])) for fp8 in ("false", "true")}
    without, found = (dict(plan.segments[0].as_written.time.parts) for plan in plans.values())
    assert 0.6 < found["matrix products"] / without["matrix products"] < 0.8
    assert 1 < found["memory-bound operations"] / without["memory-bound operations"] < 1.2
    assert sum(found.values()) < sum(without.values())
    before, after = (plan.segments[0].as_written.memory for plan in plans.values())
    assert after.parts["weights"] > before.parts["weights"]
    assert "bf16, blocks in FP8; " in stage_table(plans["true"], Cluster(DEVICES["h100-80gb"]))
    with pytest.raises(
        UserError, match="'fp8' needs a GPU of compute capability 8.9, 9.0 or later, and a100-80gb is none"
    ):
        plan_stage(drawn(*more, "fp8=true"), 1, Cluster(DEVICES["a100-80gb"]))
