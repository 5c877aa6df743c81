"""The cost of the wire."""
