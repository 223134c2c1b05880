"""Many reductions of one model, compared."""
