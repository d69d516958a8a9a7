"""What is done with a model that is trained: asking it."""
