"""What a model costs: multiply-adds, time and memory."""
