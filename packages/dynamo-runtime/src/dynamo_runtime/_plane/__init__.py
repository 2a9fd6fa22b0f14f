"""The TCP request plane: one connection between two processes carries all their calls.

Layers, lowest first: ``framing`` (bytes and frames), ``connection`` (one socket, one write a tick), ``stream`` (one
call as its server sees it), ``client`` and ``server`` (the two roles of a connection), ``pool`` (connections by
address), ``plane`` (the facade).
"""
