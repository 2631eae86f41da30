"""Raw bytes to batches of NumPy arrays. Nothing here makes a JAX array or starts a JAX backend."""
