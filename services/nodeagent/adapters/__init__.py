"""How each kind of engine is started and asked: one module per kind, all behind `api.Adapter`, named in `registry`.

All of it is pure: arguments, routes and names. Who starts a program is a runtime's matter, who asks over HTTP is
`services.nodeagent.engine_client`. Every option, variable and metric that stands here is one that the engine's own
documentation knows, in the version that ``tests/data/engine_options.json`` names.
"""
