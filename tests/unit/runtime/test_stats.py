"""Statistics: runc's JSON shape."""

from __future__ import annotations

from pathlib import Path

from boxship.linux.cgroups.stats import read_pressure, read_v1, read_v2
from boxship.oci.text import dumps
from boxship.runtime.stats import shape


def files(path: Path, **contents: str) -> str:
    path.mkdir(exist_ok=True)
    for name, text in contents.items():
        (path / name.replace("__", ".")).write_text(text)
    return str(path)


def test_a_group_that_counts_nothing_shows_what_runc_shows() -> None:
    assert shape(read_v1({}, "cpuset.")) == {
        "cpu": {},
        "cpuset": {
            "cpu_exclusive": 0, "mem_hardwall": 0, "mem_exclusive": 0, "memory_migrate": 0, "memory_spread_page": 0,
            "memory_spread_slab": 0, "memory_pressure": 0, "sched_load_balance": 0, "sched_relax_domain_level": 0,
        },
        "memory": {}, "pids": {}, "blkio": {}, "hugetlb": {}, "intel_rdt": {}, "network_interfaces": None,
    }


def test_v2_files_are_shown_under_the_names_of_v1(tmp_path: Path) -> None:
    path = files(
        tmp_path, memory__stat="anon 5\nfile 7\n", memory__current="100\n", memory__max="max\n", memory__peak="200\n",
        memory__swap__current="3\n", memory__swap__max="50\n",
        cpu__stat="usage_usec 3\nuser_usec 2\nsystem_usec 1\nnr_periods 4\nnr_throttled 5\nthrottled_usec 6\n",
        pids__current="2\n", pids__max="max\n",
        io__stat="8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n8:16 \n",
        cpu__pressure="some avg10=1.50 avg60=0.00 avg300=0.00 total=9\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
        rdma__current="mlx hca_handle=1 hca_object=2\n", rdma__max="mlx hca_handle=max hca_object=9\n",
        misc__current="res_a 3\n", misc__events="res_a.max 1\n",
    )
    stats = read_v2(path)
    shown = shape(stats)
    nothing = {"avg10": 0.0, "avg60": 0.0, "avg300": 0.0, "total": 0}
    assert shown["cpu"] == {
        "usage": {"total": 3000, "kernel": 1000, "user": 2000},
        "throttling": {"periods": 4, "throttledPeriods": 5, "throttledTime": 6000},
        "psi": {"some": {"avg10": 1.5, "avg60": 0.0, "avg300": 0.0, "total": 9}, "full": nothing},
    }
    unlimited = (1 << 64) - 1
    assert shown["memory"] == {
        "cache": 7, "usage": {"limit": unlimited, "usage": 100, "max": 200, "failcnt": 0},
        "swap": {"limit": unlimited, "usage": 103, "failcnt": 0}, "raw": {"anon": 5, "file": 7},
    }
    assert shown["pids"] == {"current": 2}
    assert shown["blkio"] == {
        "ioServiceBytesRecursive": [
            {"major": 8, "op": "Read", "value": 1}, {"major": 8, "op": "Write", "value": 2},
        ],
        "ioServicedRecursive": [{"major": 8, "op": "Read", "value": 3}, {"major": 8, "op": "Write", "value": 4}],
    }
    assert stats["rdma"] == {
        "current": {"mlx": {"hca_handle": 1, "hca_object": 2}}, "limit": {"mlx": {"hca_handle": unlimited, "hca_object": 9}},
    }
    assert stats["misc"] == {"res_a": {"usage": 3, "events": 1}}


def test_v1_block_io_is_read_from_the_kind_of_file_that_counts(tmp_path: Path) -> None:
    path = files(tmp_path)
    for name, text in (
        ("blkio.bfq.io_serviced_recursive", ""), ("blkio.bfq.io_service_bytes_recursive", ""),
        ("blkio.throttle.io_serviced_recursive", "8:0 Read 3\n8:0 Total 3\nTotal 3\n"),
        ("blkio.throttle.io_service_bytes_recursive", "8:0 Read 12\nTotal 12\n"),
    ):
        (tmp_path / name).write_text(text)
    shown = shape(read_v1({"blkio": path}, "cpuset."))
    assert shown["blkio"] == {
        "ioServiceBytesRecursive": [{"major": 8, "op": "Read", "value": 12}],
        "ioServicedRecursive": [{"major": 8, "op": "Read", "value": 3}, {"major": 8, "op": "Total", "value": 3}],
    }


def test_whole_numbers_are_written_without_a_point_as_go_does(tmp_path: Path) -> None:
    (tmp_path / "cpu.pressure").write_text("some avg10=0.00 avg60=1.50 avg300=20.00 total=9\n")
    pressure = read_pressure(str(tmp_path / "cpu.pressure"))
    assert pressure is not None
    assert dumps(pressure["some"]) == '{"avg10":0,"avg60":1.5,"avg300":20,"total":9}'


def test_pressure_that_is_not_measured_is_not_shown(tmp_path: Path) -> None:
    assert "psi" not in shape(read_v2(files(tmp_path, cpu__stat="usage_usec 3\n")))["cpu"]  # type: ignore[operator]
