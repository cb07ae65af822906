"""Directories in which a trained model leaves the house; one module for each format."""
