"""USB and IP cameras, and recordings."""
