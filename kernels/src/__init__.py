"""Pack, unpack, rotate, attend in part: each operation's plain-torch reference, and later its fused kernel beside it.

Nothing here communicates and nothing here knows a model. Legend: B batch, S sequence, H heads, D head_dim.
"""

from cocodiff.kernels.pack import pack_heads, pack_rows, unpack_heads, unpack_rows
from cocodiff.kernels.partial import attend_partial, attend_partial_reference, merge_partial
from cocodiff.kernels.rope import rotate_pairs

__all__ = [
    "attend_partial",
    "attend_partial_reference",
    "merge_partial",
    "pack_heads",
    "pack_rows",
    "rotate_pairs",
    "unpack_heads",
    "unpack_rows",
]
