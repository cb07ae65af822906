"""What a person sees of a run in TensorBoard and, without a terminal, in a log file."""

import re

import pytest
import torch
from stage_trainer.evaluation.tables import joined
from stage_trainer.run.monitor import Monitor, in_words
from stage_trainer.run.pages import MASKED_PAGE, PAGE
from stage_trainer.run.text_counts import TextCounts
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

SETTINGS = {
    "model.text.width": 64, "optimizer.name": "muon", "precision": "fp32", "seed": 0, "stage.steps": 8,
    "stage.batch.image_text": 48, "stage.batch.masked_lm": 0, "stage.lr.image": 1e-3, "stage.lr.text": 2e-3,
    "stage.resolution": ((0, 32),), "stage.augmentation.flip": False,
}  # fmt: skip
TAGS = (
    "loss/image_text", "loss/text", "validation_recall_at_5_mine/text to image", "temperature/text",
    "learning_rate_adamw/image", "speed/samples_per_second", "trouble/skipped_steps", "texts_cut/image-long/mine",
    "validation_ndcg_at_10_pairs/mean", "validation_ndcg_at_5_pages/text to image", "gradient_norm/text",
)  # fmt: skip


@pytest.fixture
def events(tmp_path):
    """What a run of eight steps left behind; options are the monitor's."""

    def run(start=0, **options):
        given = {"title": "stage 1", "start": start, "steps": 8, "every": 2, "active": True, "max_tokens": 8, **options}
        with Monitor(tmp_path, **given) as monitor:
            for step in range(start, 8):
                monitor.count(4, 40, 1000, 0.0)
                monitor.texts.count(["image-long/mine"], [4, 3])
                if monitor.wants(step):
                    monitor.log(step, {"text": (torch.tensor(1.0), None)}, {"temperature/text": 0.07})
                monitor.advance()
            monitor.scalar("validation_recall_at_5_mine/text to image", 0.25, 7)
            monitor.outcome(SETTINGS, ["validation_recall_at_5_mine/text to image", "loss/text"])
        found = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "tensors": 0})
        found.Reload()
        return found

    return run


def page(events) -> dict[str, list[str]]:
    (entry,) = events.Tensors("custom_scalars__config__")[-1:]
    layout = layout_pb2.Layout.FromString(entry.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["what matters", "is it well"]
    return {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}


def test_a_page_shows_losses_recall_temperatures_rates_and_speed_first(events):
    charts = page(events())
    first = list(charts)[: len(PAGE["what matters"])]
    shown = {tag for tag in TAGS for title in first if any(re.match(regex, tag) for regex in charts[title])}
    assert shown == set(TAGS) - {"trouble/skipped_steps", "texts_cut/image-long/mine", "gradient_norm/text"}
    assert {tag for tag in TAGS if not any(re.match(r, tag) for regexes in charts.values() for r in regexes)} == set()
    languages = "validation_recall_at_5_mine/text to image/de"
    assert not any(re.match(r, languages) for title in first for r in charts[title]), "means, not thirty languages"


def test_hidden_words_have_a_page_of_their_own(events):
    charts = page(events(max_tokens=None))
    assert next(iter(charts)) == next(iter(MASKED_PAGE["what matters"]))
    assert "share of the texts that max_tokens cuts" not in charts


def test_hparams_have_rates_and_batches_and_point_at_scalars_that_are_there(events):
    found = events()
    assert not [tag for tag in found.Tags()["scalars"] if "hparam" in tag], "no figure stands twice"
    data = found.SummaryMetadata("_hparams_/experiment").plugin_data.content
    experiment = plugin_data_pb2.HParamsPluginData.FromString(data).experiment
    metrics = [metric.name.tag for metric in experiment.metric_infos]
    assert metrics == ["validation_recall_at_5_mine/text to image", "loss/text"]
    assert set(metrics) <= set(found.Tags()["scalars"])
    data = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = plugin_data_pb2.HParamsPluginData.FromString(data).session_start_info.hparams
    assert {name: value.number_value for name, value in values.items() if value.number_value} == {
        "batch.image_text": 48, "lr.image": 1e-3, "lr.text": 2e-3, "steps": 8,
    }  # fmt: skip
    assert values["optimizer.name"].string_value == "muon"
    assert "augmentation.flip" not in values


def test_the_share_of_cut_texts_goes_on_where_the_former_process_was(events):
    found = events(start=4, texts=TextCounts({"image-long/mine": 16}, {"image-long/mine": 0}))
    curve = {event.step: event.value for event in found.Scalars("texts_cut/image-long/mine")}
    assert curve[7] == pytest.approx(12 / 32)


def test_a_run_that_goes_on_keeps_its_points_and_its_page(events):
    events()
    found = events(start=4)
    assert [event.step for event in found.Scalars("loss/text")] == [0, 2, 4, 6, 7]
    assert "loss" in page(found)


def test_a_log_file_gets_lines_and_no_bar(events, capsys):
    events()
    told = capsys.readouterr()
    assert "\r" not in told.err
    (line,) = [line for line in told.err.splitlines() if "stage 1" in line]
    assert re.fullmatch(r"stage 1: step 1 of 8, loss text 1\.000; \d+ samples/s, .+ left", line)
    assert "image-long/mine: 24 of its 32 texts so far (75.0%) are longer than max_tokens 8" in told.out


def test_durations_are_said_in_a_fitting_unit():
    assert [in_words(s) for s in (0.4, 89, 91, 5399, 5400, 172_799, 172_800)] == [
        "0 s", "89 s", "2 min", "90 min", "1.5 h", "48.0 h", "2.0 days",
    ]  # fmt: skip


def test_lines_end_between_parts_and_within_the_width():
    parts = [f"recall of pool {number} 0.{number:03d}" for number in range(40)]
    text = joined("step 20:", parts)
    assert max(map(len, text.splitlines())) <= 120
    assert ", ".join(parts) == " ".join(text.split()).removeprefix("step 20: ")
