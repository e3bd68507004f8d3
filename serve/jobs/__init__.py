"""Jobs on top of the engine: generate and score. No HTTP, no files."""
