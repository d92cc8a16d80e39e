"""How findings of several hosts become one table."""

from megagpt.preflight.findings import failed, merged, ok, table, warning, worst


def test_hosts_that_agree_are_not_named() -> None:
    (finding,) = merged({"node1": [ok("disk", "10 GiB")], "node2": [ok("disk", "10 GiB")]})
    assert finding == ok("disk", "10 GiB")


def test_hosts_that_are_well_may_differ_in_figures() -> None:
    assert merged({"node1": [ok("disk", "10 GiB")], "node2": [ok("disk", "11 GiB")]}) == [ok("disk", "10 GiB")]


def test_the_host_that_is_not_well_is_named() -> None:
    by_host = {"node1": [ok("disk", "10 GiB")], "node2": [failed("disk", "full", "free space")], "node3": []}
    assert merged(by_host) == [failed("disk", "node2: full", "free space")]


def test_the_table_reads_well() -> None:
    findings = [ok("disk", "10 GiB"), warning("shared memory", "little", "more"), failed("data", "gone", "bring back")]
    assert table(findings).splitlines() == [
        "disk           OK       10 GiB",
        "shared memory  warning  little",
        "                        -> more",
        "data           failed   gone",
        "                        -> bring back",
        "",
        "1 OK, 1 warnings, 1 failed",
    ]
    assert worst(findings) == "failed"
    assert worst([]) == "OK"
