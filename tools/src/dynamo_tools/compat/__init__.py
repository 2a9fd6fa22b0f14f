"""The checkout beside the last releases: their tests, their wire format, and processes of both in one cluster.

``matrix`` says which legs there are, from the recorded releases; ``environments`` builds wheels of any release and
installs them; ``legs`` runs tests and reads golden files; ``cluster`` starts processes of different releases.
"""
