"""What runs engines: processes of the holder (`holder_client`), or containers of the host's Docker engine (`docker`).

Both show an engine as `schemas.holders.EngineView`, start it behind a gate, and are safe to ask again at any point.
"""
