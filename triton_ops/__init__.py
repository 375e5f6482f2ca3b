"""Triton kernels: one family a file, each with its launcher and its gradient. Imports torch and triton only.

Every value is widened to fp32 right after it is loaded: sums are then formed in fp32 whatever the data's dtype, and
triton's interpreter (TRITON_INTERPRET=1), which cannot compute on bf16, runs the same code.
"""
