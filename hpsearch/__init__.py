"""Find the best UNet configuration for a segmentation dataset, and a number for it that can be published."""

__version__ = "0.1.0"
