"""Runs a command, with all it starts, for no longer than the process that asks for it lives.

    python keeper.py COMMAND

The end of standard input says that that process has gone, however it ended. Needs nothing but Python.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

PATIENCE = 20.0  # seconds to end in before it is killed


def main() -> int:
    child = subprocess.Popen(sys.argv[1], shell=True, stdin=subprocess.DEVNULL, start_new_session=True)

    ending = threading.Event()

    def end() -> None:
        while os.read(0, 1024):
            pass
        ending.set()
        with contextlib.suppress(ProcessLookupError):  # raised as soon as nobody of the group is left
            os.killpg(child.pid, signal.SIGTERM)
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline:
                child.poll()
                os.killpg(child.pid, 0)
                time.sleep(0.05)
            os.killpg(child.pid, signal.SIGKILL)
        os._exit(0)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the one who asked decides
    threading.Thread(target=end, daemon=True).start()
    code = child.wait()
    if ending.is_set():
        threading.Event().wait()  # for what the command has started, which takes longer to end than the shell
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
