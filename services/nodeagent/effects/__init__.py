"""Carries the node agent's effects out, against its holder, its engines and its GPUs.

Each is safe to begin again at any point: that is how a restarted agent adopts what runs. `performing.WORK` names them
all; one more effect is one more file here and one line there.
"""
