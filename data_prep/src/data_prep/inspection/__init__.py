"""Looking at data sets: whether they are sound, and what is in them."""
