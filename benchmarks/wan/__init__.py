"""Steps over the link that a clinic has."""
