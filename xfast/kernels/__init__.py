"""Triton kernels for NVIDIA GPUs: tensors in, tensors out; they know nothing of models.

One module per operation, with the stem that it has in ``csrc/`` if it is there, too; ``launch``, ``tiles`` and the two
that lay out integer weights are shared. Importing one needs the package ``triton``. With ``TRITON_INTERPRET=1`` set
before that import, Triton runs them on CPU tensors, in Python and slowly: that is how values are tested without a GPU.
"""
