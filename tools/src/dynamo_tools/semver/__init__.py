"""How big a change of a package is, by what its users see, against the package's own last release.

``lines`` compares dumps of the public surface, ``signatures`` two functions, ``schemas`` JSON schemas, ``golden`` the
golden wire files; griffe adds what it knows. ``judge`` puts them together, with the waivers and with the level that
fragments and version declare.
"""
