"""Raw-audio generation with state-space models."""
