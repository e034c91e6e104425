"""What Triton kernels do with tiles: reading and writing them, multiplying them, and rounding them.

Where EXACT is "interpreted", Triton's interpreter runs the kernel as numpy, which has no bf16.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile(start, y_Y, Y, x_X, X, stride):
    """(Y, X) numbers from a matrix whose rows are ``stride`` apart; 0 beyond Y and X."""
    return tl.load(start + y_Y[:, None] * stride + x_X[None, :], mask=(y_Y < Y)[:, None] & (x_X < X)[None, :], other=0.0)


@triton.jit
def rounded(x, like, EXACT: tl.constexpr):
    """``x``, fp32, in the format that ``like`` points to."""
    if EXACT == "interpreted" and like.dtype.element_ty == tl.bfloat16:  # it cuts digits off, where a GPU rounds to the nearest, ties to even
        bits = x.to(tl.uint32, bitcast=True)
        x = (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).to(tl.float32, bitcast=True)
    return x.to(like.dtype.element_ty)


@triton.jit
def put(start, tile_YX, y_Y, Y, x_X, X, stride, EXACT: tl.constexpr):
    """The inverse of `tile`."""
    tl.store(start + y_Y[:, None] * stride + x_X[None, :], rounded(tile_YX, start, EXACT), mask=(y_Y < Y)[:, None] & (x_X < X)[None, :])


@triton.jit
def dot(x_YX, y_XZ, EXACT: tl.constexpr):
    """A matrix product with sums in fp32; "interpreted" where numpy, which has no bf16, takes it."""
    if EXACT == "interpreted":
        return tl.dot(x_YX.to(tl.float32), y_XZ.to(tl.float32))
    return tl.dot(x_YX, y_XZ, input_precision=EXACT)
