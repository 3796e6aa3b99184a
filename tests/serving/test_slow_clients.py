"""Clients that are slow, go away, or open connections and leave them."""
