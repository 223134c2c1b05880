"""Pure tensor functions that methods are built from, and their Triton twins."""
