"""Networks: backbones, heads, decoders, what they expect of an image, and weights from elsewhere."""
