"""`thetau basis compare`: what keeping few vectors costs."""

from __future__ import annotations

from thetau.cli.basis.tables import compared_table, partitions_table
from thetau.cli.common import Json, Machine, TunedModels
from thetau.cli.options import with_options
from thetau.cli.tables import show
from thetau.evaluate.options import Backbone, Limits, Reading
from thetau.studies.options import CompareBases


@with_options
def compare(models: TunedModels, backbone: Backbone, options: CompareBases, reading: Reading, limits: Limits, json: Json) -> None:
    """Save-One, bases and Save-All with the same methods: accuracy, vectors and bytes kept, coefficients to choose.

    thetau basis compare runs/demo/finetuned/*/* --inner ties --data tasks
    """
    from thetau.evaluate.session import Session
    from thetau.studies.savings import compare_bases, partitions_of

    json.check()
    partitions_of(models, options)
    session = Session.open(models, base=backbone.base, limits=limits.by_split(), reading=reading)
    found = compare_bases(session, options, engine=Machine(quiet=True).engine())
    json.save(found)
    show(compared_table(found.result, options.inner, options.outer.outer))
    if found.partitions is not None:
        show(partitions_table(found.partitions))
