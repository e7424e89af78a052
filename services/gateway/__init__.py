"""The gateway: decides which replica serves a request, holds requests while a model wakes; never places or swaps."""
