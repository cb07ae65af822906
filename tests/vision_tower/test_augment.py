"""Training's crops and colours are torchvision's, the same for the same seed."""

import hashlib
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from vision_tower import augment, simclr_view
from vision_tower.augment import _crop


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_augment_is_a_function_of_its_seed(noise):
    options = {"flip": True, "color": 0.3}
    first = augment(noise, 5, 48, **options)
    torch.rand(3)
    assert first.shape == (3, 48, 48)
    assert first.dtype == torch.uint8
    assert torch.equal(augment(noise.clone(), 5, 48, **options), first)
    assert torch.equal(augment(noise, np.int64(5), 48, **options), first)
    others = [augment(noise, seed, 48, **options) for seed in (6, -5, 2**63)]
    assert not any(torch.equal(other, first) for other in others)
    assert augment(noise, 5, (24, 32)).shape == (3, 24, 32)


def test_augment_of_the_whole_image_equals_torchvisions_resize(noise):
    square = noise[:, :, :60]
    whole = augment(square, 1, 48, scale=(1, 1), ratio=(1, 1))
    assert torch.equal(whole, v2.functional.resize(square, [48, 48], v2.InterpolationMode.BICUBIC, antialias=True))
    same = augment(square, 1, 60, scale=(1, 1), ratio=(1, 1))
    assert torch.equal(same, square)
    assert same.is_contiguous()
    same.zero_()
    assert square.any(), "the pixels are the caller's, who may keep the image"


def test_augment_crops_within_the_ranges_and_anywhere():
    for height, width in ((96, 96), (200, 50), (1, 1), (3, 500)):
        tops, lefts = set(), set()
        for seed in range(300):
            top, left, rows, columns = _crop(random.Random(seed), (height, width), 1.0, (0.7, 1.0), (0.9, 1.1))
            assert 0 <= top <= top + rows <= height
            assert 0 <= left <= left + columns <= width
            if min(height, width) > 40:
                assert 0.88 < columns / rows < 1.13
                largest = max(min(height, width / shape) * min(width, height * shape) for shape in (0.9, 1.0, 1.1))
                assert 0.65 * min(height, width) ** 2 * 0.9 < rows * columns < 1.03 * largest
            tops.add(top)
            lefts.add(left)
        assert len(tops) > (height > 40) * 10
        assert len(lefts) > (width > 40) * 5


def test_augment_mirrors_half_of_the_images_and_only_when_asked():
    ramp = torch.arange(0, 240, 5, dtype=torch.uint8).expand(3, 48, 48)
    rising = [augment(ramp, seed, 48, flip=True).float().diff(dim=-1).mean() > 0 for seed in range(200)]
    assert 70 < sum(rising) < 130
    assert all(augment(ramp, seed, 48).float().diff(dim=-1).mean() > 0 for seed in range(50))


def test_colour_jitter_equals_its_three_steps_and_keeps_grey_grey(noise):
    from vision_tower.augment import jitter

    muted = noise // 2 + 60  # no clamping on the way
    stepwise = v2.functional.adjust_brightness(muted.float() / 255, 1.1)
    stepwise = v2.functional.adjust_saturation(v2.functional.adjust_contrast(stepwise, 0.8), 0.7)
    ours = jitter(muted, 1.1, 0.8, 0.7).float() / 255
    assert (ours - stepwise).abs().max() < 2 / 255
    grey = augment(noise[:1].expand(3, -1, -1), 3, 48, color=0.4)
    assert (grey.float().amax(0) - grey.float().amin(0)).max() <= 1


def test_colours_and_crops_come_from_streams_apart(noise, monkeypatch):
    """More colour is the same crop; another crop, mirroring or size of image is the same colour."""
    from vision_tower import augment as function

    module = sys.modules[function.__module__]
    before, factors, jitter = [], [], module.jitter

    def record(pixels, *drawn):
        before.append(pixels)
        factors.append(drawn)
        return jitter(pixels, *drawn)

    monkeypatch.setattr(module, "jitter", record)
    kinds = [{}, {"scale": (0.2, 0.4)}, {"ratio": (0.3, 2.0)}, {"flip": True}]
    for seed in range(60):
        plain = augment(noise, seed, 48)
        for color in (0.1, 0.5):
            augment(noise, seed, 48, color=color)
            assert torch.equal(before[-1], plain)
        factors.clear()
        for image in (noise, noise[:, :37, :41], noise[:, :5]):
            for options in kinds:
                augment(image, seed, 48, color=0.5, **options)
        assert len(set(factors)) == 1
    # And the first number of the one does not tell that of the other.
    drawn = []
    for seed in range(300):
        augment(noise, seed, 8, color=0.5)
        drawn.append((random.Random(seed).random(), factors[-1][0] - 0.5))
    assert abs(np.corrcoef(np.array(drawn).T)[0, 1]) < 0.2


def test_a_simclr_view_of_any_crop_may_be_coloured_or_not(photo):
    """Colour comes with probability 0.8 whatever the crop's stream begins with."""
    image = torch.tensor(np.asarray(photo)).permute(2, 0, 1)
    changed = {True: [], False: []}
    for seed in range(300):
        view = simclr_view(image, seed, 16, blur=False)
        crop = augment(image, seed, 16, scale=(0.08, 1), ratio=(3 / 4, 4 / 3), flip=True)
        changed[random.Random(seed).random() < 0.8].append(bool((view.int() - crop.int()).abs().max() > 3))
    for share in (sum(each) / len(each) for each in changed.values()):
        assert 0.7 < share < 0.95  # 0.84, with the grey ones that have no other colour


def test_colours_round_to_the_nearest_level_and_halves_to_the_even_one():
    from vision_tower.augment import jitter

    levels = torch.arange(0, 256, dtype=torch.uint8).expand(3, 1, 256)
    # Half the brightness: odd levels fall on halves.
    assert torch.equal(jitter(levels, 0.5, 1.0, 1.0).int(), (levels.float() / 2).round().int())
    assert jitter(levels, 0.5, 1.0, 1.0)[0, 0, [1, 3, 5]].tolist() == [0, 2, 2]
    assert jitter(levels, 1.9, 1.0, 1.0)[0, 0, -1] == 255


def test_a_crops_sides_round_to_the_nearest_pixel_where_halves_fall():
    """All of the area and one shape, so that what fits is the product and nothing is drawn."""
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    for (height, width), aspect, sides in (
        ((5, 9), 0.5, (5, 2)),  # 2.5 columns
        ((7, 9), 0.5, (7, 4)),  # 3.5
        ((9, 5), 2.0, (2, 5)),
        ((9, 7), 2.0, (4, 7)),
        ((9, 9), 1.6, (6, 9)),  # 5.625 rows
        ((9, 9), 4 / 3, (7, 9)),  # 6.75
    ):
        _, _, rows, columns = _crop(random.Random(0), (height, width), aspect, **whole)
        assert (rows, columns) == sides


def test_augment_refuses_wrong_images_and_ranges(noise):
    for wrong in (noise.float(), noise[0], noise[:1], noise[:, :0]):
        with pytest.raises(ValueError, match="expected uint8"):
            augment(wrong, 0, 48)
    for options in ({"scale": (0, 1)}, {"scale": (0.9, 0.5)}, {"ratio": (2, 1)}, {"color": 1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            augment(noise, 0, 48, **options)


def crops(count: int):
    """White noise and hard edges, up and down, wide and tall: pixels, seed, size, box of the crop, options."""
    generator = np.random.default_rng(0)
    options = {"scale": (0.2, 1), "ratio": (0.5, 2)}
    for seed in range(count):
        height, width, rows, columns = (int(side) for side in generator.integers(1, 200, 4))
        array = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        array = array if seed % 2 else ((array > 127) * 255).astype(np.uint8)
        box = _crop(random.Random(seed), (height, width), columns / rows, **options)
        yield torch.tensor(array).permute(2, 0, 1), seed, (rows, columns), box, options


def test_augment_gives_torchvisions_pixels_of_tensors():
    for image, seed, size, box, options in crops(80):
        expected = v2.functional.resized_crop(image, *box, list(size), v2.InterpolationMode.BICUBIC, antialias=True)
        assert torch.equal(augment(image, seed, size, **options), expected)


def test_one_value_in_ten_thousand_is_two_levels_from_pillows_and_none_is_further():
    """Of Pillow's passes in the kernel's order: each row's columns first."""
    counts = np.zeros(256, int)
    for image, seed, (rows, columns), (top, left, h, w), options in crops(300):
        crop = v2.functional.to_pil_image(image).crop((left, top, left + w, top + h))
        for size in ((columns, h), (columns, rows)):
            crop = crop.resize(size, Image.Resampling.BICUBIC)
        pixels = augment(image, seed, (rows, columns), **options).int()
        difference = (pixels - v2.functional.pil_to_tensor(crop)).abs()
        counts += np.bincount(difference.flatten().numpy(), minlength=256)
    assert counts[3:].sum() == 0
    assert counts[2] < 1e-4 * counts.sum()
    assert counts[1] < 0.05 * counts.sum()


PIXELS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_augment import crops, digest
print(torch.backends.cpu.get_cpu_capability(), digest())
"""


def digest() -> str:
    found = hashlib.sha256()
    for image, seed, size, _, options in crops(20):
        found.update(augment(image, seed, size, **options).numpy().tobytes())
    return found.hexdigest()


def test_pixels_are_the_same_on_every_processor_and_for_any_number_of_threads_and_layout():
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    command = [sys.executable, "-c", PIXELS, os.path.dirname(__file__)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split()[-1] == digest()
    threads = torch.get_num_threads()
    try:
        for image, seed, size, _, options in crops(20):
            found = []
            for number in (1, 2, 5):
                torch.set_num_threads(number)
                layouts = image, image.contiguous(), image.clone(memory_format=torch.preserve_format)
                found += [augment(layout, seed, size, **options, color=0.3) for layout in layouts]
            assert all(torch.equal(each, found[0]) for each in found)
    finally:
        torch.set_num_threads(threads)


def test_simclr_views_are_a_function_of_their_seed(noise):
    first = simclr_view(noise, 5, 48)
    torch.rand(3)
    assert first.shape == (3, 48, 48)
    assert first.dtype == torch.uint8
    assert torch.equal(simclr_view(noise.clone(), 5, 48), first)
    assert torch.equal(simclr_view(noise, torch.tensor(5), 48), first)
    others = [simclr_view(noise, seed, 48) for seed in (6, -5, 2**63)]
    assert not any(torch.equal(other, first) for other in others)
    with pytest.raises(ValueError, match="strength is 2"):
        simclr_view(noise, 5, 48, strength=2)


def test_simclr_changes_as_often_as_the_paper_says(photo):
    """Without strength and blur, what is left is the crop, mirrored or not, and one view in five is grey."""
    image = torch.tensor(np.asarray(photo)).permute(2, 0, 1)
    views = [simclr_view(image, seed, 16, strength=0, blur=False) for seed in range(400)]
    crops = [augment(image, seed, 16, scale=(0.08, 1), ratio=(3 / 4, 4 / 3), flip=True) for seed in range(400)]
    grey = [bool((view == view[:1]).all()) for view in views]
    assert 0.14 < sum(grey) / 400 < 0.26
    for view, crop, is_grey in zip(views, crops, grey, strict=True):
        assert is_grey or (view.int() - crop.int()).abs().max() <= 1  # the jitter of nothing rounds once
    coloured = [simclr_view(image, seed, 16, blur=False) for seed in range(400)]
    changed = sum((view.int() - crop.int()).abs().max() > 3 for view, crop in zip(coloured, crops, strict=True))
    assert 0.78 < changed / 400 < 0.9  # jitter, or grey without it: 0.8 + 0.2 * 0.2
    blurred = [simclr_view(image, seed, 16, strength=0) for seed in range(400)]
    assert 0.3 < sum(not torch.equal(b, v) for b, v in zip(blurred, views, strict=True)) / 400 < 0.6


def test_hue_and_blur_equal_torchvisions(noise):
    from vision_tower.simclr import gaussian_blur, turn_hue

    for turn in (-0.2, 0.05, 0.2):
        reference = v2.functional.adjust_hue(noise.float() / 255, turn) * 255
        assert (turn_hue(noise, turn).float() - reference).abs().max() <= 1
    grey = noise[:1].expand(3, -1, -1)
    assert torch.equal(turn_hue(grey, 0.2), grey)
    for sigma in (0.1, 1.3):
        reference = v2.functional.gaussian_blur(noise, [7, 7], [sigma, sigma])
        assert (gaussian_blur(noise, sigma).int() - reference.int()).abs().max() <= 1
