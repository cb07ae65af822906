"""What `DualEncoder.encode` takes and how it is asked: texts and images of any kind in one list."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
"""Of names that are taken for an image's."""
