"""`stage-trainer report RUN…`: what the page shows, what it says of what is missing, and how a browser draws it."""

import contextlib
import io
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from data_prep.shards import DatasetWriter
from PIL import Image
from stage_trainer.checkpoint.load import digest_of, sha256
from stage_trainer.cli import main
from stage_trainer.pages.charts import curves
from stage_trainer.pages.runs import read_runs
from torch.utils.tensorboard import SummaryWriter

WORDS = {"en": "a red disk", "de": "ein roter Kreis", "ar": "دائرة حمراء"}
COLORS = ("red", "blue", "green", "yellow", "black", "orange", "white", "brown")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A data set of captioned images in three languages."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    with DatasetWriter(folder, kind="image-short", source="pictures") as writer:
        for color in COLORS:
            file = io.BytesIO()
            Image.new("RGB", (20, 16), color).save(file, "png")
            captions = [{"text": f"{words} {color}", "language": of, "role": "name"} for of, words in WORDS.items()]
            members = {"png": file.getvalue(), "json": json.dumps({"captions": captions}).encode()}
            writer.write(color, members, languages=list(WORDS), tokens=None)
    return folder


@pytest.fixture
def write_run(reader, pictures):
    """Writes a run of two stages as training and evaluation leave it; returns its folder."""

    def write(folder: Path, recall: float = 0.5, rate: float = 1e-3) -> Path:
        for number in (1, 2):
            stage = folder / f"stage{number}"
            reader.save_pretrained(stage / "step-0000030/model")
            files = {p.relative_to(stage / "step-0000030").as_posix(): sha256(p)
                     for p in sorted((stage / "step-0000030/model").rglob("*")) if p.is_file()}  # fmt: skip
            state = {
                "step": 30, "files": files, "seconds": 7200.0, "peak_memory_bytes": 3 * 2**30, "skipped": 1,
                "settings": {"seed": 0, "stage.lr.image": rate, "stage.max_tokens": 32, "stage.batch.masked_lm": 0},
                "data": {}, "versions": {"torch": "2.15.0"}, "texts_drawn": {"image-short/x": 960, "text-pairs/y": 40},
                "texts_cut": {"image-short/x": 240, "text-pairs/y": 0},
            }  # fmt: skip
            (stage / "step-0000030/state.json").write_text(json.dumps({**state, "sha256": digest_of(state)}))
            by_language = {"en": recall, "de": recall / 2, "ar": recall / 4, "mean": recall / 2}
            figures = {
                "kind": "image-short", "folder": str(pictures), "images": 8, "texts": dict.fromkeys(WORDS, 8),
                "recall_at_5": {"text→image": {"16": by_language, "8": {of: v / 2 for of, v in by_language.items()}}},
                "chance": {"text→image": dict.fromkeys(by_language, 0.125)}, "checkpoint": "step-0000030",
            }  # fmt: skip
            (stage / "evaluation.json").write_text(json.dumps({"pictures": figures}))
            write_scalars(stage)
        lines = [{"step": 3, "shard": "0.tar", "key": "k7", "reason": "cut off"}] * 2
        (folder / "stage1/corrupt.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return write


def write_scalars(stage: Path) -> None:
    with contextlib.closing(SummaryWriter(str(stage))) as writer:
        for step in range(30):
            for task, final in (("image_text", 1.0), ("text", 0.5)):
                writer.add_scalar(f"loss/{task}", final + 5 * math.exp(-step / 6), step)
                writer.add_scalar(f"temperature/{task}", 0.07 - step * 1e-4, step)
            writer.add_scalar("bias/text", step - 10.0, step)
            writer.add_scalar("speed/samples_per_second", 100 + step % 3, step)
            writer.add_scalar("speed/step_seconds", 0.5, step)
            writer.add_scalar("speed/step_seconds_predicted", 0.4, step)
        for step in (9, 29):
            writer.add_scalar("validation_recall_at_5_pictures/text to image", step / 30, step)
            writer.add_scalar("modality_gap/pictures", 1.0 - step / 60, step)


def rows_of(page: str, title: str) -> list[list[str]]:
    """The cells of a section's table, by a parser that is not ours."""
    from lxml import html

    section = html.fromstring(page).xpath(f"//section[h2='{title}']")[0]
    return [[cell.text_content() for cell in row] for row in section.xpath(".//tr")]


def test_the_page_has_what_the_folder_has(write_run, tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    said = capsys.readouterr()
    assert said.err.count("lacking") == 0, said.err
    page = (run / "report.html").read_text()
    assert rows_of(page, "Figures") == [
        ["held-out data", "figure, %", "stage1", "stage2", "blind guess"],
        ["pictures", "text→image, recall@5", "25.0", "25.0", "12.5"],
    ]
    assert rows_of(page, "Data seen")[1] == ["stage1", "image-short/x", "960", "96%", "240", "25.0%", "32"]
    assert rows_of(page, "Corrupt samples")[1] == ["stage1", "cut off", "0.tar k7", "2"]
    costs = ["stage2", "30", "2.00", "3.0 GiB", "101", "0.5", "0.4", "+25%", "1"]
    assert rows_of(page, "Speed and plan")[2] == costs
    assert ["seed", "0", "0"] in rows_of(page, "Settings")
    assert ["torch", "2.15.0", "2.15.0"] in rows_of(page, "Versions")
    for title in ("loss, image_text", "loss, text", "temperature, text", "bias, text", "modality gap",
                  "text→image, recall@5", "pictures: text→image, recall@5", "samples a second"):  # fmt: skip
        assert f"<figcaption>{title}</figcaption><svg" in page, title
    ranks = [int(rank) for rank in re.findall(r"own image: number (\d) of 8", page)]
    assert 0 < page.count('class="right" title') == sum(rank <= 6 for rank in ranks), "six images are shown"
    pngs = sorted((run / "report-pictures").glob("*.png"))
    assert len(pngs) == page.count("<figcaption>") + 1
    assert all(len(np.unique(np.asarray(Image.open(png)))) > 4 for png in pngs), "one of them is blank"
    assert not re.search(r'(?:src|href)="(?!data:|#)', page), "it needs nothing else"


def test_runs_stand_side_by_side_and_settings_that_differ_are_marked(write_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = write_run(tmp_path / "sweep/lr=1e-3", recall=0.5)
    (first / "stage1/corrupt.jsonl").write_text("?")
    write_run(tmp_path / "sweep/lr=2e-3", recall=0.75, rate=2e-3)
    assert main(["report", "sweep/lr=1e-3", "sweep/lr=2e-3", "--searched", "0"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert rows_of(page, "Figures")[0][2:-1] == [f"lr={n}e-3 stage{s}" for n in (1, 2) for s in (1, 2)]
    assert rows_of(page, "Figures")[1][2:-1] == ["25.0", "25.0", "37.5", "37.5"]
    assert re.findall(r'class="differs"><td>([^<]+)', page) == ["stage.lr.image"]
    assert "Searches" not in page
    assert re.search(r"<li><b>lr=1e-3:</b> sweep/lr=1e-3/stage1/corrupt.jsonl: 1 of its lines", page)


def test_what_a_run_lacks_is_named_and_not_drawn(write_run, tmp_path, capsys):
    run = write_run(tmp_path / "run")
    for file in (run / "stage1").glob("*tfevents*"):
        file.unlink()
    for stage in (run / "stage1", run / "stage2"):
        (stage / "evaluation.json").write_text("{")
    with contextlib.closing(SummaryWriter(str(run / "stage2"), filename_suffix=".more")) as writer:
        for step in (30, 31):
            writer.add_scalar("loss/broken", math.nan, step)
    (run / "stage1/corrupt.jsonl").write_text('{"step": 1}\n{"st')
    state = run / "stage1/step-0000030/state.json"
    state.write_text(state.read_text().replace('"seed": 0', '"seed": 1'))
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    told = capsys.readouterr().err
    for what in (
        "stage1 has no TensorBoard files", "stage1/evaluation.json is not what", "stage2/evaluation.json is not what",
        "loss/broken is not finite at 2 of 2 steps", "corrupt.jsonl: 1 of its lines cannot be read",
        "step-0000030 has no readable state.json", "no searches: stage2 was not evaluated on images",
        "no figures: so no Matryoshka curve and no languages",
    ):  # fmt: skip
        assert what in page, what
        assert what in told, what
    for section in ("Figures", "Matryoshka", "Languages", "Searches"):
        assert f"<h2>{section}</h2>" not in page
    assert "loss, broken" not in page


def test_a_resumed_run_shows_its_last_values(write_run, tmp_path):
    run = write_run(tmp_path / "run")
    next((run / "stage1").glob("*tfevents*")).rename(run / "stage1/events.out.tfevents.0000000001.earlier")
    with contextlib.closing(SummaryWriter(str(run / "stage1"), purge_step=20)) as writer:
        for step in range(20, 25):
            writer.add_scalar("loss/text", 9.0, step)
    curve = read_runs([run])[0].stages[0].curves["loss/text"]
    assert list(curve.steps) == list(range(25))
    assert list(curve.values[20:]) == [9.0] * 5


def test_a_chart_draws_its_values():
    """Two of the points, read back from the path in the SVG."""
    from stage_trainer.pages.charts import Line

    assert curves("x", "x", [Line("", np.arange(3.0), np.full(3, math.nan), 0)]) is None
    chart = curves("x", "x", [Line("", np.array([0.0, 10.0, 20.0]), np.array([1.0, 3.0, 2.0]), 0)])
    line = re.search(r'<path d="M ([^"]+)"[^>]*style="[^"]*stroke: var\(--c0\)', chart.svg)[1]
    points = [tuple(map(float, pair.split())) for pair in line.split("L")]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y0 - y1 == pytest.approx(2 * (y2 - y1)), "SVG counts down"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing"], "there is no folder missing"),
        (["data"], "data holds no run"),
        (["run", "run/"], "a run is named twice"),
        (["run", "seed=1"], "a page is of runs alone"),
        (["run", "--recipe=x.yaml"], "a page is of runs alone"),
        (["run", "--out=x.txt"], "name a file that ends in .html"),
        (["run", "--out=nowhere/x.html"], "there is no folder nowhere"),
        (["run", "--searched=-1"], "--searched is -1"),
        (["run", "--data=missing"], "there is no folder missing"),
        (["--out=x.html"], "--out is of the page"),
    ],
)
def test_what_makes_no_page_is_refused(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_scalars(tmp_path / "run/stage1")
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", *words]) == 2
    assert said in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    write_scalars(tmp_path / "run/stage1")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(tmp_path / "run")]) == 2
    assert "pip install matplotlib jinja2" in capsys.readouterr().err


# In a browser.

PROBLEMS = """() => {
  const found = [], width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) found.push('the page is wider than the window');
  for (const element of document.querySelectorAll('main *')) {
    const box = element.getBoundingClientRect();
    if (box.width && (box.right > width + 0.5 || box.left < -0.5) && !element.closest('.scroll'))
      found.push(`${element.tagName} ${element.className} goes beyond the window`);
  }
  for (const table of document.querySelectorAll('.scroll')) {
    const box = table.getBoundingClientRect();
    if (box.right > width) found.push('a table goes beyond the window');
  }
  for (const figure of document.querySelectorAll('figure')) {
    const title = figure.getAttribute('aria-label'), frame = figure.querySelector('svg')?.getBoundingClientRect();
    const outside = box => box.right > frame.right + 1 || box.left < frame.left - 1;
    const colored = [...figure.querySelectorAll('svg [style*="var(--c"]')].map(part => part.getBoundingClientRect());
    const drawn = colored.filter(box => box.width + box.height);  // shapes that are defined for use have no place
    if (!frame || frame.width < 200 || !drawn.some(box => box.width + box.height > 20)) found.push(`${title} is empty`);
    else if (drawn.some(outside)) found.push(`${title} is cut off`);
    for (const text of figure.querySelectorAll('svg text')) {
      const box = text.getBoundingClientRect();
      if (box.height < 8) found.push(`${title}: letters of ${box.height}`);
      if (outside(box)) found.push(`${title}: ${text.textContent} is cut off`);
    }
  }
  for (const image of document.images) if (!image.naturalWidth) found.push('an image is broken');
  return found;
}"""
CONTRAST = """() => {
  const light = color => { const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const page = light(getComputedStyle(document.body).backgroundColor);
  const of = [...document.querySelectorAll('h1, section > p, td, .note, svg text, dt')].map(element => {
    const style = getComputedStyle(element), ink = light(element.closest('svg') ? style.fill : style.color);
    return (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05); });
  return [page, Math.min(...of)];
}"""


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no Chromium here to open pages with (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # root, as in containers
        yield opened
        opened.close()


def problems_of(browser, page: Path) -> list[str]:
    """What is wrong with a page at two widths, light and dark, its folded parts open."""
    found = []
    for width in (400, 1400):
        for scheme in ("light", "dark"):
            tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            said: list[str] = []
            tab.on("console", lambda message, said=said: said.append(f"console: {message.text}"))
            tab.on("pageerror", lambda error, said=said: said.append(f"error: {error}"))
            tab.on("requestfailed", lambda request, said=said: said.append(f"not loaded: {request.url}"))
            tab.goto(page.resolve().as_uri())
            tab.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true })")
            said += tab.evaluate(PROBLEMS)
            brightness, contrast = tab.evaluate(CONTRAST)
            if (brightness < 0.2) != (scheme == "dark"):
                said.append(f"its background is {brightness:.2f} bright")
            if contrast < 3.5:
                said.append(f"letters have a contrast of {contrast:.1f}")
            found += [f"{width} {scheme}: {what}" for what in dict.fromkeys(said)]
            tab.close()
    return found


def test_a_browser_draws_all_of_it_at_two_widths_light_and_dark(write_run, tmp_path, browser, capsys):
    hostile = "a_run-$x_1$<b>&amp;\"' with a name that is long enough to go on and on and on"
    first, second = write_run(tmp_path / hostile), write_run(tmp_path / "_b", recall=0.75)
    assert main(["report", str(first), str(second), "--out", str(tmp_path / "page.html")]) == 0
    page = tmp_path / "page.html"
    assert not (found := problems_of(browser, page)), "\n".join(found)
    tab = browser.new_page()
    tab.goto(page.as_uri())
    assert tab.locator(".runs h3").all_inner_texts()[:2] == [hostile, "_b"]
    assert tab.locator("figure").count() >= 8
    frames = tab.locator(".found li.right").evaluate_all("all => all.map(e => getComputedStyle(e).outlineColor)")
    assert set(frames) == {"rgb(46, 139, 87)"}
    assert (
        tab.locator(".query[dir=auto]", has_text="دائرة").first.evaluate("e => getComputedStyle(e).direction") == "rtl"
    )


def test_the_browser_notices_what_it_is_there_for(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        "<meta charset=utf-8><body style='background:#fff'><main><div style='width:2000px'>x</div>"
        "<figure aria-label='none'><svg></svg></figure><img src='missing.png'><h1 style='color:#eee'>pale</h1></main>"
        "<script>console.log('hello'); throw Error('broken')</script>"
    )
    found = "\n".join(problems_of(browser, page))
    for what in ("wider than the window", "DIV  goes beyond", "none is empty", "an image is broken", "console: hello",
                 "error: broken", "not loaded", "a contrast of",
                 "1400 dark: its background is 1.00 bright"):  # fmt: skip
        assert what in found, what
