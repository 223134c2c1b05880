"""Where images come from, and how they become what a model takes."""
