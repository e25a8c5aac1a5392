"""What methods share while training: taps, loss terms, batches, gathering and extra passes. Knows no method."""
