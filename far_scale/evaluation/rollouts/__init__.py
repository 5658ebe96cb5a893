"""Roll-outs: samples beside their ground truth, as pictures, videos and figures."""
