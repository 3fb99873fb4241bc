"""Memory limits as the kernel's files tell them; the files here are copies of real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from kamacache.node.exits import NodeEndError
from kamacache.node.space import CgroupLimit, cgroup_limits, check_space

MIB = 1 << 20


def proc(root: Path, cgroup: str, mountinfo: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(mountinfo.replace("ROOT", str(root)))
    return root / "proc"


def cgroup(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_version_2_with_its_parents(tmp_path: Path) -> None:
    files = proc(
        tmp_path,
        "0::/system.slice/kama.service\n",
        "29 22 0:26 / ROOT/cg rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n",
    )
    cgroup(tmp_path / "cg")
    middle = cgroup(
        tmp_path / "cg/system.slice",
        memory__max=f"{512 * MIB}\n",
        memory__stat=f"anon {100 * MIB}\nfile {300 * MIB}\nshmem {50 * MIB}\n",
    )
    cgroup(tmp_path / "cg/system.slice/kama.service", memory__max="max\n")
    assert list(cgroup_limits(files)) == [CgroupLimit(middle, 512 * MIB, 150 * MIB)]
    check_space(tmp_path, 361 * MIB, proc=files)
    with pytest.raises(NodeEndError, match=r"363\.0 MiB.*cgroup.*362\.0 MiB") as caught:
        check_space(tmp_path, 363 * MIB, proc=files)
    assert caught.value.code == 3


def test_version_1_with_its_parents(tmp_path: Path) -> None:
    files = proc(
        tmp_path,
        "9:name=systemd:/\n4:memory:/api/one\n2:cpu,cpuacct:/\n0::/\n",
        "30 29 0:28 / ROOT/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
        "33 29 0:31 / ROOT/memory rw - cgroup cgroup rw,memory\n"
        "34 29 0:32 / ROOT/unified rw - cgroup2 cgroup2 rw\n",
    )
    cgroup(tmp_path / "memory", memory__limit_in_bytes="9223372036854771712\n")
    outer = cgroup(tmp_path / "memory/api", memory__limit_in_bytes=f"{64 * MIB}\n")
    inner = cgroup(tmp_path / "memory/api/one", memory__limit_in_bytes=f"{32 * MIB}\n")
    (tmp_path / "unified").mkdir()
    assert [(limit.folder, limit.limit_bytes) for limit in cgroup_limits(files)] == [
        (inner, 32 * MIB),
        (outer, 64 * MIB),
    ]


def test_container_that_sees_its_own_cgroup_as_the_root(tmp_path: Path) -> None:
    files = proc(
        tmp_path,
        "0::/docker/0123\n",
        "29 22 0:26 /docker/0123 ROOT/cg rw - cgroup2 cgroup rw\n",
    )
    own = cgroup(tmp_path / "cg", memory__max=f"{64 * MIB}\n")
    assert [limit.folder for limit in cgroup_limits(files)] == [own]


def test_no_cgroups_are_no_limit(tmp_path: Path) -> None:
    assert list(cgroup_limits(tmp_path / "none")) == []
    check_space(tmp_path, 1, proc=tmp_path / "none")


def test_this_machines_own_files_can_be_read() -> None:
    for limit in cgroup_limits():
        assert limit.folder.is_dir()
        assert limit.limit_bytes > 0


def test_full_folder_names_both_sizes_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(NodeEndError, match=r"need .* has .* free.*--shm-size") as caught:
        check_space(tmp_path, 1 << 60, proc=tmp_path / "none")
    assert caught.value.code == 3
