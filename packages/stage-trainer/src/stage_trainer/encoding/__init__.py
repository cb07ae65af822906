"""What `DualEncoder.encode` takes and how it is asked: texts and images of any kind in one list."""
