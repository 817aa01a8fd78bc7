"""Behaves as launchers do, without their start-up time: python fake_launcher.py N MODULE ARGUMENTS...

Starts N workers; kills them all at once when it is signalled, or when one of them fails, and passes its code on.
FAKE_LAUNCHER says what it does otherwise: "waits" for the others, "dies" itself, "starts again" workers that finish.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time


def main() -> int:
    count, module, *arguments = sys.argv[1:]
    if os.environ["FAKE_WORKER"] == "no workers":
        signal.pause()
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments], env=os.environ | {"RANK": str(rank), "WORLD_SIZE": count}
        )
        for rank in range(int(count))
    ]

    def kill(*_: object) -> None:
        for worker in workers:
            worker.kill()
        sys.exit(1)

    signal.signal(signal.SIGTERM, kill)
    signal.signal(signal.SIGINT, kill)
    if os.environ.get("FAKE_LAUNCHER") == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    failed: list[int] = []
    while None in [worker.poll() for worker in workers]:
        failed = [worker.returncode for worker in workers if worker.returncode]
        if failed and os.environ.get("FAKE_LAUNCHER") != "waits":
            for worker in workers:
                worker.kill()
            break
        time.sleep(0.02)
    codes = [worker.wait() for worker in workers]
    if any(codes) and os.environ.get("FAKE_LAUNCHER") == "starts again":
        os.environ |= {"FAKE_WORKER": "finish", "FAKE_LAUNCHER": ""}
        return main()
    return failed[0] % 256 if failed else max(code % 256 for code in codes)


if __name__ == "__main__":
    sys.exit(main())
