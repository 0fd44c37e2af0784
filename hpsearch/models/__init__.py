"""Networks, and the calculation of their shapes, memory and FLOPs."""
