"""Videos and lists of videos: finding, checking and decoding them, and mapping frames to an autoencoder's input."""
