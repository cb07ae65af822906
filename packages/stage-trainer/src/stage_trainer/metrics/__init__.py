"""Metrics: numbers from embeddings. Nothing here reads files or knows of models."""
