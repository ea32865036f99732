"""The CPU decoder's kernels in C++, how they are built, and how a model is packed for them."""

WEIGHT_FORMATS = ("fp32", "bf16", "fp16", "int8")  # in the order of `formats` in decode.cpp
