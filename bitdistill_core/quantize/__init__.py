"""Quantisers, one file each. Every scale multiplies: `weight ~ weight_scale * w_ternary`."""
