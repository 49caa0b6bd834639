"""The kernels as operators of torch.library, namespace `nsa_kernels_triton`: launches, and shapes for torch.compile."""
