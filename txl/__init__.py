"""Transformer-XL (arXiv:1901.02860): its types, model, data, and what one step means."""
