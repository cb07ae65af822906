"""What each machine carries beside its devices, and what of it holds them up."""

import dataclasses
import json

import pytest
from data_prep.shards import DatasetWriter
from stage_trainer.plan.devices import DEVICES
from stage_trainer.plan.flops import StepShape, kept_patches, vision_flops
from stage_trainer.plan.machines import ASSUMED, DECODED, load_of, machines_table
from stage_trainer.plan.planner import Cluster, model_of, plan_stage
from stage_trainer.recipe.read import load

SETTINGS = ["optimizer.name=adamw", "resolution=[[0, 32]]", "batch={image_text: 64, text: 32}"]


@pytest.fixture
def planned(recipes):
    def of(cluster, *settings):
        recipe = load(recipes / "drawn.yaml", ["corpus=nowhere", *SETTINGS, *settings], 1).recipe
        return recipe, plan_stage(recipe, 1, cluster)

    return of


def test_a_machine_carries_its_share_of_a_step(planned):
    cluster = Cluster(DEVICES["h100-80gb"], 16)
    recipe, plan = planned(cluster, "checkpoint.every=50")
    (part,) = plan.segments
    load, seconds = load_of(recipe, plan, part, cluster), part.seconds(part.as_written, cluster)
    assert (load.machines, load.devices, load.keep, load.data, load.assumed) == (2, 8, 1, 0, True)
    assert load.images == pytest.approx(64 / 2 / seconds)
    assert load.fetched == pytest.approx((32 * ASSUMED["image_text"] + 16 * ASSUMED["text"]) / seconds)
    assert load.every == pytest.approx(50 * seconds)
    assert load.cores("384 px") == pytest.approx(load.images / DECODED["384 px"])
    alone = Cluster(DEVICES["h100-80gb"])
    recipe, plan = planned(alone)
    assert load_of(recipe, plan, plan.segments[0], alone).sent == 0 < load.sent


def test_the_checkpoint_has_the_size_of_a_real_one(planned, recipes, tmp_path):
    """Weights and AdamW's two moments, in float32, to the bytes of headers and of configurations."""
    import torch
    from stage_trainer.build import empty_model

    cluster = Cluster(DEVICES["h100-80gb"])
    recipe, plan = planned(cluster)
    numbers = sum(p.numel() for p in empty_model(recipe, 1).parameters())
    assert load_of(recipe, plan, plan.segments[0], cluster).checkpoint == 3 * numbers * torch.float32.itemsize


def test_sizes_are_those_of_the_data_where_they_are(planned, tmp_path):
    made = tmp_path / "train/text-pairs/made"
    with DatasetWriter(made, kind="text-pairs", source="made", samples_per_shard=10) as writer:
        for number in range(40):
            sample = json.dumps({"query": f"{number}", "target": "a" * 10 * number}).encode()
            writer.write(f"s{number}", {"json": sample}, languages=["en"], tokens=9)
    whole = sum(tar.stat().st_size for tar in made.glob("*.tar"))
    cluster = Cluster(DEVICES["h100-80gb"], 16)
    recipe, plan = planned(cluster, f"corpus={tmp_path}", "data.text=[{path: text-pairs/made}]")
    (part,) = plan.segments
    load = load_of(recipe, plan, part, cluster)
    seconds = part.seconds(part.as_written, cluster)
    assert load.assumed, "there are no images"
    assert load.data == whole // 2
    assert load.fetched == pytest.approx((32 * ASSUMED["image_text"] + 16 * whole / 40) / seconds)


def test_what_holds_the_devices_up_is_named(planned):
    cluster = Cluster(DEVICES["h100-80gb"], 16)
    recipe, plan = planned(cluster)
    load = load_of(recipe, plan, plan.segments[0], cluster)
    enough = int(load.cores("2,000 px")) + 1
    assert "nothing of this holds the devices up" in machines_table(recipe, plan, cluster, enough, 2 * load.fetched)
    slow = machines_table(recipe, plan, cluster, 1, load.fetched / 2)
    assert "held up by decoding, if the originals have 384 px or more, with 1 cores and by fetching" in " ".join(
        slow.split()
    )
    told = machines_table(recipe, plan, cluster, None, None)
    assert "held up" not in told
    assert "holds the devices up" not in told
    assert max(map(len, slow.splitlines())) <= 120


def test_nothing_is_said_of_a_device_of_which_too_little_is_known(planned):
    unknown = dataclasses.replace(DEVICES["h100-80gb"], bandwidth=None)
    recipe, plan = planned(Cluster(unknown, 16))
    assert machines_table(recipe, plan, Cluster(unknown, 16), 8, 1e9) == ""


def test_images_whose_embeddings_come_from_the_disk_are_neither_decoded_nor_computed(planned):
    """As much as is left of a step when its images are taken away from it, but for the loss."""
    cluster = Cluster(DEVICES["h100-80gb"])
    frozen = ("trainable.image=none", "patch_dropout=[[0, 0]]", "augmentation.views=1")
    found = {}
    for name, more in (("runs", ()), ("stored", ("embedding_cache=kept",))):
        recipe, plan = planned(cluster, *frozen, *more)
        found[name] = plan.segments[0].as_written, load_of(recipe, plan, plan.segments[0], cluster)
    (runs, carried), (stored, less) = found["runs"], found["stored"]
    assert carried.images > 0 == less.images
    assert less.fetched > carried.fetched  # bytes of as many samples, in less time
    vision = model_of(recipe, 1, plan.segments[0].segment, "fp32").vision
    shape = StepShape(images=64, kept_patches=kept_patches(vision, 0.0))
    assert runs.flops.model - stored.flops.model == vision_flops(vision, shape, "none").model
    assert stored.time.total < runs.time.total
    assert stored.memory.total < runs.memory.total
