"""Our own compiled operations (``csrc/``) as functions of torch tensors."""
