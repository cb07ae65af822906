"""Curation: filters, deduplicates, splits and relabels data sets, and measures mixes of them."""
