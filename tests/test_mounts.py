"""Which file system a path lies on, from what the kernel says of its mounts."""

from pathlib import Path

import pytest

from sweep.results.mounts import LOCAL, file_system, kind_at

MOUNTS = r"""
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
22 27 0:21 / /proc rw,relatime - proc proc rw
30 27 0:40 / /home rw,relatime shared:3 master:1 - nfs4 server:/home rw,vers=4.2,hard
31 30 0:41 / /home/me/scratch rw - lustre 10.0.0.1@o2ib:/scratch rw,flock
32 27 0:42 / /gpfs/fs1 rw - gpfs fs1 rw
33 27 0:43 / /mnt/beegfs rw - beegfs beegfs_nodev rw
34 27 0:44 / /mnt/ceph rw - ceph mon:/ rw
35 27 0:45 / /mnt/windows rw - cifs //host/share rw
36 27 0:46 / /mnt/ssh rw - fuse.sshfs host:/ rw
37 27 0:47 / /mnt/with\040blank rw - nfs server:/b rw,vers=3
38 27 0:48 / /auto rw - autofs systemd-1 rw
39 38 0:49 / /auto rw - nfs4 server:/auto rw
40 27 0:50 / /dev/shm rw - tmpfs tmpfs rw
41 27 0:51 / /mnt/host rw - virtiofs host rw
a line that is no mount
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/srv/runs/s", "ext4"),
        ("/home", "nfs4"),
        ("/home/me/runs/s", "nfs4"),
        ("/home/me/scratch/runs", "lustre"),
        ("/home/me/scratchy", "nfs4"),
        ("/homes/x", "ext4"),
        ("/gpfs/fs1/runs", "gpfs"),
        ("/mnt/beegfs/runs", "beegfs"),
        ("/mnt/ceph/runs", "ceph"),
        ("/mnt/windows/runs", "cifs"),
        ("/mnt/ssh/runs", "fuse.sshfs"),
        ("/mnt/with blank/runs", "nfs"),
        ("/auto/runs", "nfs4"),
        ("/dev/shm/runs", "tmpfs"),
        ("/mnt/host/runs", "virtiofs"),
    ],
)
def test_the_deepest_and_last_mount_above_a_path_is_its_own(path: str, kind: str) -> None:
    assert kind_at(path, MOUNTS) == kind


def test_only_what_one_machine_has_to_itself_is_local() -> None:
    kinds = {line.partition(" - ")[2].split(" ")[0] for line in MOUNTS.splitlines() if " - " in line}
    assert kinds & LOCAL == {"ext4", "tmpfs"}
    assert kind_at("/x", "") not in LOCAL


def test_a_link_is_followed_to_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc")
    assert file_system(tmp_path / "link") == "proc"
    assert file_system(tmp_path) == file_system(tmp_path / "not there yet") != "unknown"
