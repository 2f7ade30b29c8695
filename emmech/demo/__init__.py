"""The demos: the whole loop on the embedded organism, and its first half on a real 135M model."""
