"""Sizes of memory layouts, shared with the C++ kernels: `kernels/cpu/library.py` passes them to the compiler."""

PAGE_SIZE = 64  # S, tokens of a cache page
GROUP_SIZE = 32  # elements of an int8 weight's row that share a scale
COLUMN_BLOCK = 32  # output columns that a packed weight stores together
