"""The server process: start-up, memory plan, HTTP protocol, lifecycle, logs."""
