"""What elastic memory is worth under pressure: an elastic engine against three static ones with the same device bytes.

    A          vLLM without chunked prefill; its activation reserve covers the longest prompt, the rest is KV memory
    B          vLLM with chunked prefill, its step size tuned; the reserve covers one step
    C          as B, with the host's bytes added to the device's
    elastic    KV memory and activations share the device's bytes, step by step
    host       as B, with the host's bytes as a buffer for KV blocks that leave the device
    both       elastic, with that buffer

Every scenario prints the bound that follows from bytes and rates measured in the same run, then what came out.
"""
