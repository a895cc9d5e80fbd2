"""Our own compiled kernels (``csrc/``) as functions of torch tensors, and their backward passes."""
