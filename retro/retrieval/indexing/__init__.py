"""Search over a store: exact, by ScaNN and faiss, by words, fused, re-ranked, in shards."""
