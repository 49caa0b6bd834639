"""Who computes: each module is one `nsa_fa2.kernel.Kernel` over somebody's FlashAttention."""
