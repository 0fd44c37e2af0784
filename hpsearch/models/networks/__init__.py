"""Networks, one per module, selected by name: `unet.network = "unet"` selects `unet.py`."""
