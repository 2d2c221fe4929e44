"""The parts of MaskedAdam: its options, its state for each parameter, and its checkpoints."""
