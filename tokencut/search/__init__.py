"""The search for a schedule."""
