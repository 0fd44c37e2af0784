"""Prediction with trained networks: tiling, post-processing, official scores and export."""
