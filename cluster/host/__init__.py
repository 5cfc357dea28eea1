"""What runs on a machine of a cluster, by itself: standard library only, Python 3.8 and newer."""
