"""Models by name or file: found, built, loaded and saved."""
