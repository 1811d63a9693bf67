"""Search in a store: exact, approximate (ScaNN, faiss), lexical, fused, and over shards."""
