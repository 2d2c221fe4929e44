"""The loop that runs a method's phases, its checkpoints, pretraining and estimates of memory. It knows no method."""
