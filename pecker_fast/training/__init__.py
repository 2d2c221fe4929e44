"""The loop that runs a method's phases, its checkpoints, configuration and presets. It knows no method by name."""
