"""What runs: fixed shapes and the executables compiled for them. Imports model, never serve; sees no request."""
