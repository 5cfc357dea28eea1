"""Machines: find, create, reach, destroy. One file a backend."""
