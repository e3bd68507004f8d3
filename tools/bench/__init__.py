"""`python -m tools.bench`: throughput and latency, as ratios against limits measured in the same run."""
