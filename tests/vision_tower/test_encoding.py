"""`encode`: images of any kind in, numpy embeddings out, in the order given."""

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
    for wrong in (photo, "a.png", b"", np.zeros((4, 4, 3), np.uint8), iter([photo]), {0: photo}, {"a.png"}):
        with pytest.raises(ValueError, match=r"encode\(\[image\]\)"):
            tower.encode(wrong)
    for options in ({"truncate_dim": 0}, {"truncate_dim": 65}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            tower.encode([photo], **options)


def test_a_tower_can_learn_after_it_encoded(tower: VisionTower, photo, images):
    tower.encode([photo])
    tower(images).sum().backward()
    assert tower.pos_embed.grad is not None
