"""One thread in each test process: tiny tensors gain nothing from more, and sums come out the same everywhere."""
import os

os.environ["OMP_NUM_THREADS"] = "1"
