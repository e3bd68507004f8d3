"""The OpenAI wire format: schema, endpoints, log-prob objects, streams and errors. Never imports jax."""
