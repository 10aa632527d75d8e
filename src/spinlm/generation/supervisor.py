"""Run a shell command until the parent process ends.

    python supervisor.py COMMAND

The parent closes standard input to stop the command; its exit does the same. Imports only the standard library.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

SHUTDOWN_TIMEOUT = 20.0  # seconds between SIGTERM and SIGKILL


def main() -> int:
    """Run the command in its own process group and return its exit code."""
    child = subprocess.Popen(sys.argv[1], shell=True, stdin=subprocess.DEVNULL, start_new_session=True)
    stopping = threading.Event()

    def stop_with_parent() -> None:
        while os.read(0, 1024):
            pass
        stopping.set()
        with contextlib.suppress(ProcessLookupError):  # the process group is empty
            os.killpg(child.pid, signal.SIGTERM)
            deadline = time.monotonic() + SHUTDOWN_TIMEOUT
            while time.monotonic() < deadline:
                child.poll()
                os.killpg(child.pid, 0)
                time.sleep(0.05)
            os.killpg(child.pid, signal.SIGKILL)
        os._exit(0)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=stop_with_parent, daemon=True).start()
    code = child.wait()
    if stopping.is_set():
        threading.Event().wait()  # the shell has exited; `stop_with_parent` still waits for its children
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
