"""`thetau basis rebuild`: cluster a bank anew."""

from __future__ import annotations

from thetau.cli.basis.common import BankFolder, Changing, Clusters, Evidence, Given, Moved
from thetau.cli.basis.report import report, write_state
from thetau.cli.common import Json, Machine
from thetau.cli.options import with_options


@with_options
def rebuild(
    bank: BankFolder,
    clusters: Clusters,
    given: Given,
    evidence: Evidence,
    moved: Moved,
    change: Changing,
    json: Json,
    machine: Machine,
) -> None:
    """Cluster anew: from the tasks' vectors where they are still at hand, from the stored bases where not.

    thetau basis rebuild bank -k 3
    """
    from thetau.bases import rebuild as make

    json.check()
    opened = moved.open(bank)
    done = make(
        opened,
        vectors=given.of(opened),
        evidence=evidence.by_kind(),
        k=clusters.k,
        k_min=clusters.k_min,
        k_max=clusters.k_max,
        drift=change.drift,
        wait=change.wait,
        engine=machine.engine(),
    )
    report(done, quiet=machine.quiet)
    if json.json is not None:
        write_state(done, json.json)
