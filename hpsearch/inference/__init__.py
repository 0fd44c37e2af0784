"""Prediction with trained networks: tiling, post-processing, scores of the ISIC-2017 challenge, and export."""
