"""Scripted sessions of stock clients: each module is a program of its own, run by any version of its client."""
