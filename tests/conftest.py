"""What is the same for all tests, wherever they are started from."""
import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"               # tiny tensors gain nothing from more, and sums come out the same
for ignored in (signal.SIGINT, signal.SIGHUP):    # by nohup, or a shell's &: all that a test starts would inherit that
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored == signal.SIGINT else signal.SIG_DFL)
