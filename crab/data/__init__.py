"""The AV-UIE v2 layout on disk, its media, and the generated world that fills it."""
