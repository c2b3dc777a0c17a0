"""What a run leaves: metrics, report, checkpoints."""
