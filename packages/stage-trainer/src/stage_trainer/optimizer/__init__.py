"""The optimizer of a stage: parameter groups, AdamW or Muon, the learning-rate schedule, norms of updates."""
