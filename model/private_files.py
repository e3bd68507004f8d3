"""Check of files whose content runs in this process: CPU kernels and compiled programs."""

import os
from pathlib import Path


def is_private(path: Path) -> bool:
    """Whether only this user and root can write a file or folder; False for a symbolic link and a missing file."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022
