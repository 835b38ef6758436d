"""Triton kernels of the ops of a decoder layer on CUDA, each with the function that launches it.

Imported only when the first of them is called: these modules need Triton, the rest of the package does not. A launch
waits for nothing, so that it can be part of a CUDA graph; the first call with a new width or type compiles, and so has
to come before a capture.
"""

# Products and sums that follow them round once, as in the C++ kernels; said at every launch, because Triton's default
# is another one from version to version.
LAUNCH = {"enable_fp_fusion": True}
