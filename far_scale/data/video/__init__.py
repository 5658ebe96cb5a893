"""Videos, lists of them, and latents that others extracted: what is to be encoded, read and cut to size."""
