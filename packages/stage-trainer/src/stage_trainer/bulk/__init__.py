"""Files to embeddings: what `stage-trainer encode` does. It resumes, and shares the work among processes."""
