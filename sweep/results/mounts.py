"""Which kind of file system a folder lies on, and whether this machine has it to itself."""

from pathlib import Path

LOCAL = frozenset(
    {
        *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "bcachefs"),
        *("tmpfs", "ramfs", "overlay"),
    }
)
"""Kinds of which all readers and writers run under one kernel. What is not listed counts as shared, which is slower to
look into and never wrong: nfs4, lustre, gpfs, beegfs, ceph, cifs, 9p, whatever FUSE brings, and what is yet to come."""


def file_system(folder: Path) -> str:
    """The kind of file system that `folder` lies on, as the kernel names it: `ext4`, `nfs4`, `fuse.sshfs`."""
    return kind_at(str(folder.resolve()), Path("/proc/self/mountinfo").read_text())


def kind_at(path: str, mountinfo: str) -> str:
    """The kind at an absolute path by the text of /proc/self/mountinfo (proc(5)); `unknown` where that names none."""
    best, kind = "", "unknown"
    for line in mountinfo.splitlines():
        fields, dash, rest = line.partition(" - ")
        if not dash:
            continue
        point = _plain(fields.split(" ")[4])
        # The deepest mount has the path; of several at one point the last covers the others.
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, rest.split(" ")[0]
    return kind


def _plain(point: str) -> str:
    """A mount point without the octal escapes of blanks and the like."""
    for escaped, plain in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        point = point.replace(escaped, plain)
    return point
