"""Pure mathematics on tensors: no config, no model, no file. Symbols follow the papers.

Shapes: B sequences, T tokens. A per-token tensor is (B, T); a mask is bool and True where a token
counts. Functions return per-item values; training/optimize.py divides by the global count.
"""
