"""Files that another machine writes: how long a file system may hide them, and what is wrong with them."""

import threading

from rlinf_core import shared_files
from rlinf_core.shared_files import PATIENCE, has_sizes, has_text, lag, wait_until_seen

MOUNTS = """\
22 1 253:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 22 0:40 / {0}/home rw,relatime shared:2 - nfs4 server:/home rw,vers=4.2
41 40 0:41 / {0}/home/my\\040disk rw - xfs /dev/sdb rw
42 22 0:42 / {0}/bucket rw,nosuid - fuse.gcsfuse bucket rw
43 22 0:43 / {0}/tmp rw - tmpfs tmpfs rw
44 22 0:44 / {0}/tmp rw - lustre server:/scratch rw
"""


def test_only_file_systems_of_one_machine_hide_nothing(tmp_path):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS.format(tmp_path))
    for folder, seconds in {
        "runs": 0.0,
        "home/runs": PATIENCE,  # Nothing of it exists.
        "homework": 0.0,
        "home/my disk/runs": 0.0,
        "bucket": PATIENCE,
        "tmp/runs": PATIENCE,  # The later mount covers the earlier one.
    }.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        assert lag(tmp_path / folder / "run", mounts) == seconds, folder
    assert lag(tmp_path, tmp_path / "none") == PATIENCE


def test_a_file_that_comes_late_is_waited_for(tmp_path):
    file = tmp_path / "runs" / "token"

    def write():
        file.parent.mkdir()
        file.write_text("token")

    late = threading.Timer(0.2, write)
    late.start()
    assert wait_until_seen(lambda: has_text(file, "token"), file.parent, seconds=30) == ""
    late.join()
    file.write_text("another token")
    assert wait_until_seen(lambda: has_text(file, "token"), file.parent, seconds=0.1) == "it has another content"
    assert shared_files.PAUSES[1] < PATIENCE


def test_content_and_size_count_and_no_time(tmp_path):
    """As on a bucket whose mount showed a rank's shard as an empty file."""
    (tmp_path / "__0_0.distcp").write_bytes(b"1234")
    (tmp_path / "__1_0.distcp").write_bytes(b"")
    assert has_sizes(tmp_path, {"__0_0.distcp": 4}) == ""
    assert has_sizes(tmp_path, {"__0_0.distcp": 4, "__1_0.distcp": 4}) == "__1_0.distcp has 0 bytes instead of 4"
    assert has_sizes(tmp_path, {"__2_0.distcp": 4}) == "__2_0.distcp: there is no such file"
