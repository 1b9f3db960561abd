"""Other people's checkpoints and samplers."""
