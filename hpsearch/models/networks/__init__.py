"""Networks, one module each, found by name: `unet.network = "unet"` is `unet.py`."""
