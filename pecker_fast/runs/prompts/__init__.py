"""Runs on text-to-image models: forget the prompts of a concept."""
