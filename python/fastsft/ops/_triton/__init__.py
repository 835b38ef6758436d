"""Triton kernels of the ops of a decoder layer on CUDA, each with the function that launches it.

Imported only when the first of them is called: these modules need Triton, the rest of the package does not. A launch
waits for nothing, so that it can be part of a CUDA graph. It goes to the current device, which the dispatcher has made
the tensors' (ops/_library.py). Triton compiles a kernel again for other types, widths, numbers of heads and directions,
and for sizes, strides and addresses that are multiples of 16 or not; a call that compiles cannot be captured, so the
same call has to come before.
"""

# Products and sums that follow them round once, as in the C++ kernels; said at every launch, because Triton's default
# is another one from version to version.
LAUNCH = {"enable_fp_fusion": True}
