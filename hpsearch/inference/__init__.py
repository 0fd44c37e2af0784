"""Predict with trained networks: tiles, post-processing, official scores, export."""
