"""Inspection: validates data sets and shows what is in them."""
