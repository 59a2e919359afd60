"""A chain of processes, each the child of the one before, all of them waiting.

.. code-block:: text

    python -I -S tree.py DEPTH [ignore-sigterm] [setsid] [exit=STATUS] [print-fds]
"""

import os
import signal
import sys
import time


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


depth, *options = sys.argv[1:]
if "print-fds" in options:
    print(*(number for number in range(64) if is_open(number)), flush=True)
if "ignore-sigterm" in options:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
first = os.getpid()
for _ in range(1, int(depth)):
    if os.fork():
        break
    if "setsid" in options:
        os.setsid()
status = next((int(option.removeprefix("exit=")) for option in options if option.startswith("exit=")), None)
if os.getpid() == first and status is not None:
    time.sleep(0.1)
    if status < 0:
        os.kill(first, -status)
    os._exit(status)
while True:
    time.sleep(60)
