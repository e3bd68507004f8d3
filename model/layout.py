"""Sizes of memory layouts, shared with the C++ kernels: `kernels/cpu/library.py` passes them to the compiler."""

PAGE_SIZE = 64  # S, tokens of a cache page
COLUMN_BLOCK = 32  # output columns that a packed weight stores together; the smallest block of K is as long
