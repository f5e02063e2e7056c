"""`thetau basis add | negate | ood | compare`: arithmetic on the bases of a bank."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from thetau.cli.basis_data import (
    Alphas,
    BankFolder,
    BatchSize,
    ByHand,
    CacheFolder,
    Converged,
    Data,
    Epochs,
    Finding,
    ImageSize,
    Json,
    Kind,
    MaxLength,
    Model,
    MovedBase,
    Outer,
    OuterFields,
    Rate,
    Scaled,
    Sizes,
    Steps,
    Test,
    Validation,
    check_outputs,
    individuals,
    inner_of,
    live,
    loaded,
    opened_bank,
    outer_of,
    own_vector,
    quiet_engine,
    similarity_to,
    write_json,
    write_model,
)
from thetau.cli.basis_tables import added_table, compared_table, negated_table, partitions_table, served_table, show
from thetau.cli.common import MaxMemory, Quiet, Workers, engine
from thetau.cli.tables import parse_grid
from thetau.errors import RecipeError

if TYPE_CHECKING:
    from thetau.bases import Bank

Share = Annotated[
    float, typer.Option("--keep", help="Share of the control task's accuracy that negation must keep.", min=0, max=1)
]


def add(
    bank: BankFolder,
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", help="A task to evaluate; by default the bank's own. May be repeated.")
    ] = None,
    outer: Outer = "sum",
    fields: OuterFields = None,
    per_basis: Annotated[
        bool, typer.Option("--per-basis", help="Choose a coefficient for each basis too, one after the other.")
    ] = False,
    sweeps: Annotated[int, typer.Option("--sweeps", help="--per-basis: times over all bases.", min=1)] = 1,
    scale: Scaled = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="TASK=MODEL: a task's own model, where it is no longer where it was.")
    ] = None,
    alphas: Alphas = None,
    out: Model = None,
    base: MovedBase = None,
    data: Data = None,
    validation: Validation = None,
    test: Test = None,
    max_length: MaxLength = 64,
    image_size: ImageSize = None,
    kind: Kind = None,
    cache: CacheFolder = None,
    json: Json = None,
    workers: Workers = None,
    max_memory: MaxMemory = None,
    quiet: Quiet = False,
) -> None:
    """Add all bases: θ₀ + λ merge(bases), λ chosen on the tasks' validation, or given by --scale, for a bank of any size.

    thetau basis add bank --data tasks -o merged
    """
    check_outputs(out, json)
    machine = engine(workers, max_memory, quiet)
    opened, method = opened_bank(bank, base), outer_of(outer, fields)
    if per_basis and method is not None:
        raise RecipeError([f"--per-basis is for a sum; {outer} makes one vector of all bases. Leave one out."], "options")
    if scale is not None:
        _without_data(scale, out, json, alphas, task)
        if out is not None:
            write_model(opened, out, dict.fromkeys(opened.bases, scale), method, machine=machine, quiet=quiet)
        return
    from thetau.studies.arithmetic import ADDITION
    from thetau.studies.bases import bases_addition, outer_space
    from thetau.studies.partitions import outer_name

    sizes = Sizes(
        data=data,
        validation=validation,
        test=test,
        max_length=max_length,
        image_size=image_size,
        kind=kind,
        cache=cache,
    )
    tasks = loaded(task or list(opened.members), data)
    names = [one.name for one in tasks]
    grid = parse_grid(alphas) or ADDITION
    moved = {name: Path(path) for name, _, path in (text.partition("=") for text in model or [])}
    folders = {name: moved.get(name, Path(opened.members[name].source)) for name in names if name in opened.members}
    one = live(base or opened.base_label, tasks, sizes, folders)
    own, lost = individuals(opened, one, names, model or [], cache)
    space, parts = outer_space(
        one.evaluator,
        one.weights,
        opened.vectors(),
        method,
        tangent=opened.space == "tangent",
        cache=cache,
        engine=quiet_engine(),
    )
    found = bases_addition(
        space,
        names,
        parts,
        outer=outer_name(method),
        grid=grid,
        own=per_basis,
        sweeps=sweeps,
        members=len(opened.members),
        vectors=len(opened.bases),
        individual=own,
    )
    write_json(json, {**_facts(opened, sizes), "no_individuals": lost, "result": found})
    show(added_table(found, outer))
    for name, reason in lost.items():
        typer.echo(f"accuracy is not normalised, for want of the model of {name}: {reason}")
    if out is not None:
        chosen = found.best.coefficients if method is None else dict.fromkeys(opened.bases, found.scale)
        write_model(opened, out, chosen, method, machine=machine, quiet=quiet)


def negate(
    bank: BankFolder,
    task: Annotated[str, typer.Option("--task", "-t", help="The task to forget.")],
    control: Annotated[str | None, typer.Option("--control", help="The task that negation must keep.")] = None,
    keep: Share = 0.95,
    vector: Converged = None,
    steps: Steps = None,
    epochs: Epochs = None,
    basis: ByHand = None,
    lr: Rate = None,
    batch_size: BatchSize = None,
    scale: Scaled = None,
    alphas: Alphas = None,
    out: Model = None,
    base: MovedBase = None,
    data: Data = None,
    validation: Validation = None,
    test: Test = None,
    max_length: MaxLength = 64,
    image_size: ImageSize = None,
    kind: Kind = None,
    cache: CacheFolder = None,
    json: Json = None,
    workers: Workers = None,
    max_memory: MaxMemory = None,
    quiet: Quiet = False,
) -> None:
    """Subtract the basis of a task: its own cluster's, the most similar one (--vector, --steps, --epochs), or --basis by hand.

    thetau basis negate bank --task sms_spam --control qnli --data tasks
    """
    check_outputs(out, json)
    machine = engine(workers, max_memory, quiet)
    finding = Finding(vector=vector, steps=steps, epochs=epochs, bases=tuple(basis or ()), lr=lr, batch_size=batch_size)
    if len(finding.bases) > 1:
        raise RecipeError([f"negation subtracts one basis. Got {', '.join(finding.bases)}."], "--basis")
    if scale is None and control is None:
        raise RecipeError(["--control TASK is missing, the task that negation must keep; or give --scale."], "options")
    if scale is not None and (control is not None or steps is not None or epochs is not None):
        raise RecipeError(["--scale takes no data, so leave --control, --steps and --epochs out."], "options")
    opened = opened_bank(bank, base)
    if scale is not None:
        _without_data(scale, out, json, alphas, None)
        from thetau.evaluate.similarity import similar_bases, similarity_given, similarity_of_vector

        if finding.bases:
            chosen = similarity_given(task, finding.bases, list(opened.bases)).given[0]
        elif vector is not None:
            chosen = similar_bases(similarity_of_vector(task, own_vector(opened, vector, task), opened.similar))[0]
        else:
            chosen = opened.basis_of(task)
        if out is not None:
            write_model(opened, out, {chosen: -scale}, None, machine=machine, quiet=quiet)
        return
    from thetau.errors import DataError
    from thetau.evaluate.similarity import similar_bases
    from thetau.studies.arithmetic import NEGATION
    from thetau.studies.bases import basis_negation, outer_space

    target, kept = loaded([task], data)[0], loaded([control or ""], data)[0]
    task, control = target.name, kept.name
    if control == task:
        raise DataError(f"negation of {task!r}: the control task must be another one.")
    sizes = Sizes(
        data=data,
        validation=validation,
        test=test,
        max_length=max_length,
        image_size=image_size,
        kind=kind,
        cache=cache,
    )
    grid = parse_grid(alphas) or NEGATION
    own = None if finding.ways else opened.basis_of(task)
    folders = {name: Path(opened.members[name].source) for name in (task, control) if name in opened.members}
    if vector is not None:
        folders[task] = Path(vector)
    if any(alpha < 0 for alpha in parse_grid(alphas) or ()):
        raise RecipeError(
            [f"--alphas of a negation must be 0 or more: below 0 the basis would be added. Got {alphas!r}."], "options"
        )
    one = live(base or opened.base_label, [target, kept], sizes, folders)
    similarity = None if own is not None else similarity_to(opened, task, finding, sizes, one)
    used = own if similarity is None else similar_bases(similarity)[0]
    assert used is not None
    how: Literal["own", "similar", "given"] = "own" if similarity is None else "given" if finding.bases else "similar"
    space, _ = outer_space(
        one.evaluator, one.weights, {used: opened.vector(used)}, None, tangent=opened.space == "tangent", cache=cache
    )
    members = opened.bases[used].members
    found = basis_negation(space, task, control, used, members=members, how=how, similarity=similarity, grid=grid, share=keep)
    write_json(json, {**_facts(opened, sizes), "result": found})
    show(negated_table(found, keep))
    if out is not None:
        write_model(opened, out, {used: -found.negation.tuned.alpha}, None, machine=machine, quiet=quiet)


def ood(
    bank: BankFolder,
    task: Annotated[str, typer.Option("--task", "-t", help="The new task.")],
    vector: Converged = None,
    steps: Steps = None,
    epochs: Epochs = None,
    basis: ByHand = None,
    lr: Rate = None,
    batch_size: BatchSize = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Merge all bases of at least this cosine; by default the most similar one, however similar it is."),
    ] = None,
    most: Annotated[int | None, typer.Option(help="At most so many bases, the most similar ones.", min=1)] = None,
    outer: Outer = "sum",
    fields: OuterFields = None,
    store: Annotated[
        bool,
        typer.Option("--store", help="Where no basis is similar, insert the vector of --vector as a new one; needs --threshold."),
    ] = False,
    alphas: Alphas = None,
    out: Model = None,
    base: MovedBase = None,
    data: Data = None,
    validation: Validation = None,
    test: Test = None,
    max_length: MaxLength = 64,
    image_size: ImageSize = None,
    kind: Kind = None,
    cache: CacheFolder = None,
    json: Json = None,
    workers: Workers = None,
    max_memory: MaxMemory = None,
    quiet: Quiet = False,
) -> None:
    """Serve a task that the bank does not know by the bases that are similar to it; where none is, say so, or store its vector.

    thetau basis ood bank --task rte --steps 1 --threshold 0.05 --data tasks
    """
    check_outputs(out, json)
    machine = engine(workers, max_memory, quiet)
    finding = Finding(vector=vector, steps=steps, epochs=epochs, bases=tuple(basis or ()), lr=lr, batch_size=batch_size)
    if not finding.ways:
        raise RecipeError(["how is the task similar to the bases? Give --vector, --steps, --epochs or --basis."], "options")
    _check_choice(finding, threshold, most)
    if store and (vector is None or threshold is None):
        raise RecipeError(
            [
                "--store keeps a converged vector where no basis is similar enough: give --vector and --threshold. "
                "A vector of few steps says what a task is like, but is not worth keeping."
            ],
            "options",
        )
    opened, method = opened_bank(bank, base), outer_of(outer, fields)
    target = loaded([task], data)[0]
    task = target.name
    if task in opened.members:
        raise RecipeError(
            [
                f"the bank holds {task!r} already, in the basis {opened.basis_of(task)}. Out of distribution is a task that it does not."
            ],
            "--task",
        )
    from thetau.evaluate.similarity import similar_bases
    from thetau.studies.arithmetic import ADDITION
    from thetau.studies.bases import basis_ood, outer_space
    from thetau.studies.partitions import outer_name

    grid = parse_grid(alphas) or ADDITION
    sizes = Sizes(
        data=data,
        validation=validation,
        test=test,
        max_length=max_length,
        image_size=image_size,
        kind=kind,
        cache=cache,
    )
    one = live(base or opened.base_label, [target], sizes, {} if vector is None else {task: Path(vector)})
    similarity = similarity_to(opened, task, finding, sizes, one)
    chosen = similar_bases(similarity, threshold, most)
    vectors = {name: opened.vector(name) for name in chosen}
    space, parts = outer_space(
        one.evaluator,
        one.weights,
        vectors,
        method,
        tangent=opened.space == "tangent",
        cache=cache,
        engine=quiet_engine(),
    )
    found = basis_ood(space, similarity, chosen, parts, threshold=threshold, outer=outer_name(method), grid=grid)
    write_json(json, {**_facts(opened, sizes), "result": found})
    show(served_table(found, outer))
    if found.store:
        if store and vector is not None:
            from thetau.bases import insert

            done = insert(opened, own_vector(opened, vector, task), task, to="new", engine=machine)
            typer.echo(f"{bank}: the vector of {task} is stored as the basis {done.basis_of(task)}")
        else:
            typer.echo(
                f"no basis has a cosine of at least {threshold:g}: {task} is like nothing in the bank. Store its vector as a new basis: "
                f"thetau basis insert {bank} {task}={vector or 'MODEL'} --to new, or --store here."
            )
    if out is not None and found.alpha is not None:
        write_model(opened, out, dict.fromkeys(chosen, found.alpha), method, machine=machine, quiet=quiet)


def compare(
    models: Annotated[
        list[str], typer.Argument(help="Fine-tuned models, whose records name their tasks, or TASK=MODEL; folders or files.")
    ],
    base: Annotated[
        str, typer.Option("--base", "-b", help="The pre-trained model: gives architecture, tokenizer, heads.")
    ] = "all-MiniLM-L6-v2",
    inner: Annotated[
        str, typer.Option("--inner", help="How a cluster is merged: a name from `thetau methods`, or mean.")
    ] = "mean",
    inner_fields: Annotated[
        list[str] | None, typer.Option("--inner-set", help="A field of the inner method, as density=0.2; may be repeated.")
    ] = None,
    outer: Outer = "sum",
    fields: OuterFields = None,
    k: Annotated[str, typer.Option("-k", help="Clusters: a number, or auto for the largest gap of the spectrum.")] = "auto",
    cluster: Annotated[
        list[str] | None, typer.Option("--cluster", help="A,B,…: a cluster by hand; repeat. Tasks in none stand alone.")
    ] = None,
    every: Annotated[
        bool,
        typer.Option(
            "--all-partitions", help="Compare with every partition of the tasks too: 15 of four, 52 of five, 203 of six."
        ),
    ] = False,
    alphas: Alphas = None,
    data: Data = None,
    validation: Validation = None,
    test: Test = None,
    max_length: MaxLength = 64,
    image_size: ImageSize = None,
    kind: Kind = None,
    cache: CacheFolder = None,
    json: Json = None,
) -> None:
    """Save-One, bases and Save-All with the same methods: accuracy, vectors and bytes kept, coefficients to choose.

    thetau basis compare runs/demo/finetuned/*/* --inner ties --data tasks
    """
    from thetau.bases import all_partitions, given_groups, similarities
    from thetau.bases import cluster as find_clusters
    from thetau.evaluate.tuned import one_space, open_tuned
    from thetau.facade import as_vector, open_base
    from thetau.facade import open as open_weights
    from thetau.studies.arithmetic import ADDITION
    from thetau.studies.partitions import Bench, compare_savings, study_partitions

    check_outputs(None, json)
    merge_in, merge_out = inner_of(inner, inner_fields), outer_of(outer, fields)
    grid = parse_grid(alphas) or ADDITION
    tuned = [open_tuned(model) for model in models]
    partitions = all_partitions([model.task for model in tuned]) if every else []  # too many are refused before any work
    sizes = Sizes(
        data=data,
        validation=validation,
        test=test,
        max_length=max_length,
        image_size=image_size,
        kind=kind,
        cache=cache,
    )
    one = live(base, loaded([model.task for model in tuned], data), sizes, {model.task: model.path for model in tuned})
    tangent = one_space(tuned, one.encoder)
    start = open_base(base)
    vectors = {model.task: as_vector(open_weights(model.path, base=start), start).named(model.task) for model in tuned}
    if cluster:
        found = given_groups([part.split(",") for part in cluster], list(vectors))
    else:
        try:
            wanted: int | Literal["auto"] = "auto" if k == "auto" else int(k)
        except ValueError as error:
            raise RecipeError([f"must be a number or auto. Got {k!r}."], "-k") from error
        found = find_clusters(similarities(vectors, engine=quiet_engine()), wanted)
    bench = Bench(
        one.evaluator,
        one.weights,
        vectors,
        inner=merge_in,
        outer=merge_out,
        tangent=tangent,
        grid=grid,
        run=cache,
        engine=quiet_engine(),
    )
    result = compare_savings(bench, found.groups)
    facts = {"models": models, "base": base, "space": "tangent" if tangent else "weights", "limits": sizes.limits()}
    study = study_partitions(bench, partitions, natural=found.groups) if every else None
    write_json(json, {**facts, "clustering": found, "result": result, "partitions": study})
    show(compared_table(result, inner, outer))
    if study is not None:
        show(partitions_table(study))


def _without_data(scale: float, out: Path | None, json: Path | None, alphas: str | None, task: list[str] | None) -> None:
    problems = []
    if not isfinite(scale):
        problems.append(f"--scale must be a finite number. Got {scale:g}.")
    if out is None:
        problems.append("--scale writes a model and measures nothing: say where, with --out.")
    if json is not None or alphas is not None or task:
        problems.append("--scale takes no data, so leave --task, --alphas and --json out.")
    if problems:
        raise RecipeError(problems, "options")


def _check_choice(finding: Finding, threshold: float | None, most: int | None) -> None:
    if threshold is not None and not -1 <= threshold <= 1:
        raise RecipeError([f"is a cosine, between −1 and 1. Got {threshold:g}."], "--threshold")
    if finding.bases and (threshold is not None or most is not None):
        raise RecipeError(["--basis says which bases to use; leave --threshold and --most out."], "options")


def _facts(bank: Bank, sizes: Sizes) -> dict[str, Any]:
    facts: dict[str, Any] = {"bank": str(bank.path), "base": bank.base_label, "space": bank.space}
    bases: Mapping[str, list[str]] = {name: list(basis.members) for name, basis in bank.bases.items()}
    return {**facts, "bases": bases, "limits": sizes.limits()}
