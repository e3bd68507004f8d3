"""Optional kernels, a folder per platform. Absent or unbuilt, XLA does their work."""
