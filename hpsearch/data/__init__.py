"""Find, check, decode, cache, split and augment images and masks."""
