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

PATIENCE = 20.0  # seconds to end in before it is killed


def main() -> int:
    child = subprocess.Popen(sys.argv[1], shell=True, stdin=subprocess.DEVNULL, start_new_session=True)

    def end() -> None:
        while os.read(0, 1024):
            pass
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(PATIENCE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # what the command left behind
        os._exit(0)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the one who asked decides
    threading.Thread(target=end, daemon=True).start()
    code = child.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
