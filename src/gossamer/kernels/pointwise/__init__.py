"""The pointwise functions between FLUX's linears: pure-torch references here, Triton kernels beside them.

The references need nothing but torch and run anywhere. `backends.py` puts them and the kernels behind one record of
functions, so that whoever runs a model chooses between them once, before the first call.
"""

from gossamer.kernels.pointwise.gelu import gelu_concat, gelu_rows
from gossamer.kernels.pointwise.modulate import Modulation, norm_modulate, residual_gate_, residual_gate_norm_modulate_
from gossamer.kernels.pointwise.product import rescale_product
from gossamer.kernels.pointwise.rotary import HeadNorm, Rotation, TextNorm, qk_norm_rope_
from gossamer.kernels.pointwise.rows import Rows, quantize_rows

__all__ = [
    "HeadNorm",
    "Modulation",
    "Rotation",
    "Rows",
    "TextNorm",
    "gelu_concat",
    "gelu_rows",
    "norm_modulate",
    "qk_norm_rope_",
    "quantize_rows",
    "rescale_product",
    "residual_gate_",
    "residual_gate_norm_modulate_",
]
