"""The engine: a scheduler, and the one thread that runs its steps on the device.

Its clients use `engine.Engine` through `client.EngineClient` and the types in `request`.
"""
