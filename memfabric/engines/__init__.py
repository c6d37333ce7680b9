"""Connectors: how inference engines keep their KV cache in the pool. Each imports its engine only when used."""
