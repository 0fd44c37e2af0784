"""What is trained on: finding, checking, decoding, caching, dividing and augmenting images and masks."""
