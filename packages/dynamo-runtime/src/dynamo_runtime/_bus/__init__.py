"""The ZeroMQ event bus: publishers bind, discovery tells where, subscribers connect.

``wire`` holds what travels, ``publisher`` the sending side with its rings, ``sequence`` the rules for duplicates and
gaps, ``subscription`` the receiving side, ``replay`` the questions to rings, ``bus`` the facade.
"""
