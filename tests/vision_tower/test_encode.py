"""`encode`: images of any kind in, numpy embeddings out, in the order given."""

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from vision_tower import ImageError, PackedPatches, VisionTower, normalize, preprocess, preprocess_native


def test_encode_at_native_aspect_equals_each_image_packed_alone(tower, photo):
    pages = [photo, photo.rotate(90, expand=True), photo.resize((200, 20))]
    embeddings = tower.encode(pages, native_aspect=True, batch_size=2, normalize=False)
    for page, embedding in zip(pages, embeddings, strict=True):
        pixels = normalize(preprocess_native(page, patch=8, max_patches=36))
        with torch.no_grad():
            alone = tower(PackedPatches.from_images([pixels], 8))[0]
        assert np.allclose(embedding, alone.numpy(), atol=1e-5)


def test_encode_takes_images_of_every_kind_and_keeps_their_order(tower, photo, encoded, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(photo, "PNG"))
    array = np.asarray(photo)
    mixed = [tmp_path / "a.png", photo, array, photo.rotate(180), torch.tensor(array).permute(2, 0, 1)]
    embeddings = tower.encode(mixed, batch_size=2, show_progress=True)
    assert embeddings.dtype == np.float32
    assert embeddings.shape == (5, 64)
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    for row in (1, 2, 4):
        assert np.allclose(embeddings[row], embeddings[0], atol=1e-5)
    assert not np.allclose(embeddings[3], embeddings[0], atol=1e-2)
    with torch.no_grad():
        raw = tower(normalize(preprocess(photo, 48)[None])).numpy()
    assert np.allclose(tower.encode(array[None], normalize=False), raw, atol=1e-5)
    assert tower.encode([]).shape == (0, 64)
    paths = np.array([tmp_path / "a.png"] * 3, dtype=object)  # a column of a table
    assert np.allclose(tower.encode(paths, batch_size=2), embeddings[:1], atol=1e-6)


def test_encode_truncates_and_then_normalises(tower, photo):
    full = tower.encode([photo], normalize=False)
    short = tower.encode([photo], truncate_dim=16)
    assert np.allclose(short, full[:, :16] / np.linalg.norm(full[:, :16]), atol=1e-6)


def test_encode_gives_float32_from_a_float64_tower(tower, photo):
    assert tower.double().encode([photo], normalize=False).dtype == np.float32


def test_encode_says_what_is_wrong(tower, photo, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ImageError, match=r"images\[1\]: .*broken\.jpg"):
        tower.encode([photo, tmp_path / "broken.jpg"])
    with pytest.raises(ImageError, match=r"images\[2\]: image given as ndarray is float64"):
        tower.encode([photo, photo, np.zeros((4, 4, 3))], batch_size=2, native_aspect=True)
    for options in (
        {"truncate_dim": 0}, {"truncate_dim": 65}, {"truncate_dim": True}, {"truncate_dim": 16.0},
        {"batch_size": 0}, {"batch_size": True}, {"batch_size": 2.5},
        {"max_pixels": 0}, {"max_pixels": float("nan")}, {"max_pixels": photo.width * photo.height - 1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            tower.encode([photo], **options)


def test_a_tower_can_learn_after_it_encoded(tower: VisionTower, photo, images):
    tower.encode([photo])
    tower(images).sum().backward()
    assert tower.pos_embed.grad is not None


def test_what_holds_images_under_names_or_in_no_order_is_refused(tower, photo, tmp_path):
    """Of each, list() gives keys, column names, or images in any order."""
    import pandas
    import pyarrow

    path = tmp_path / "a.png"
    photo.save(path)
    rows = {"image": [str(path)] * 2, "id": [1, 2]}
    frame = pandas.DataFrame(rows)
    containers = [
        {str(path): photo}, OrderedDict(a=photo), {str(path)}, frozenset({str(path)}), {"a": photo}.keys(),
        frame, frame[["image"]], pyarrow.table(rows),
        photo, str(path), path, path.read_bytes(), bytearray(path.read_bytes()), memoryview(path.read_bytes()), None, 3,
        np.zeros((4, 4, 3), np.uint8), torch.zeros(3, 4, 4, dtype=torch.uint8), np.array(str(path)), np.array([1, 2]),
    ]  # fmt: skip
    for container in containers:
        with pytest.raises(ValueError, match=r"got a .*; write encode\(\[image\]\) for one, encode\(list\(values\)\)"):
            tower.encode(container)


def test_every_kind_of_row_of_images_gives_the_same_embeddings(tower, photo, tmp_path):
    import pandas
    import pyarrow

    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        photo.rotate(20 * i).save(path)
    expected = tower.encode(paths)
    names = list(map(str, paths))
    series = pandas.Series(names, index=[7.5, 3, 9, 1, 0])
    column = pyarrow.array(names).to_pandas()
    values = dict(enumerate(paths)).values()
    rows = [tuple(paths), iter(paths), (path for path in paths), values, np.array(names), series, column,
            series.to_numpy(), pandas.Index(names)]  # fmt: skip
    for images in rows:
        assert np.array_equal(tower.encode(images, batch_size=2), tower.encode(paths, batch_size=2))
    assert np.allclose(tower.encode(iter(paths), batch_size=np.int64(3), show_progress=True), expected, atol=1e-5)
    short = tower.encode(paths, truncate_dim=np.int32(16))
    assert np.array_equal(short, tower.encode(paths, truncate_dim=16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_nothing_follows_the_default_dtype_or_device(tower, photo, dtype):
    from vision_tower import augment, patch_keep_indices, simclr_view

    image = torch.tensor(np.asarray(photo)).permute(2, 0, 1)

    def everything():
        pixels = [preprocess_native(photo, patch=8, max_patches=n) for n in (9, 20)]
        packed = PackedPatches.from_images([normalize(each) for each in pixels], 8).drop([1, 2], 0.3)
        with torch.no_grad():
            yield tower(packed)
        yield normalize(image)
        yield torch.from_numpy(tower.encode([photo, photo.rotate(90, expand=True)]))
        yield torch.from_numpy(tower.encode([photo], native_aspect=True))
        yield augment(image, 5, 48, color=0.4)
        yield simclr_view(image, 4, 48)
        yield patch_keep_indices([3, 4], 36, 0.5)

    expected = list(everything())
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    try:
        found = list(everything())
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for ours, reference in zip(found, expected, strict=True):
        assert ours.dtype == reference.dtype
        assert torch.equal(ours, reference)


def test_threads_that_encode_at_once_get_their_rows_and_leave_the_mode(tower, photo):
    images = [photo.rotate(30 * i) for i in range(6)]
    expected = tower.encode(images)
    tower.train()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda count: tower.encode(images[:count], batch_size=2), [1, 6, 3, 5] * 3))
    assert tower.training
    assert torch.is_grad_enabled()
    for rows in found:
        assert np.allclose(rows, expected[: len(rows)], atol=1e-5)


def test_encode_prepares_images_as_the_configuration_says(tower, photo):
    other = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "crop_pct": 0.8, "crop_mode": "border"}
    tower.config = replace(tower.config, **other, interpolation="bilinear")
    pixels = preprocess(photo, 48, crop_pct=0.8, crop_mode="border", interpolation="bilinear", fill=other["mean"])
    with torch.no_grad():
        expected = tower(normalize(pixels, other["mean"], other["std"])[None]).numpy()
    assert np.allclose(tower.encode([photo], normalize=False), expected, atol=1e-5)
    pixels = preprocess_native(photo, patch=8, max_patches=36, interpolation="bilinear")
    with torch.no_grad():
        expected = tower(PackedPatches.from_images([normalize(pixels, other["mean"], other["std"])], 8)).numpy()
    assert np.allclose(tower.encode([photo], normalize=False, native_aspect=True), expected, atol=1e-5)
