"""The page of a bank: its clusters, its members, its history and its budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thetau.bases import Bank
from thetau.checkpoint.locate import known_as
from thetau.report.blocks import Block, Column, Facts, Heatmap, Lines, Notes, Page, Section, Table
from thetau.report.text import gigabytes


def bank_page(bank: Bank, *, problems: tuple[str, ...] | None = None) -> Page:
    """The page; `problems`: what reading every byte found, None where that was not done."""
    return Page(
        title=bank.path.resolve().name,
        about="bank of bases",
        lead=f"{len(bank.members)} tasks in {len(bank.bases)} bases, {gigabytes(bank.nbytes)}, over {_shown(bank.base_label)}.",
        sections=(_budget(bank, problems), _clusters(bank), _bases(bank), _members(bank), _history(bank)),
    )


def _shown(label: str) -> str:
    """A base as others know it: what people call the model in a folder, or a hub id."""
    return known_as(label) if Path(label).is_absolute() or Path(label).exists() else label


def _budget(bank: Bank, problems: tuple[str, ...] | None) -> Section:
    settings = bank.state.settings
    facts = Facts(
        pairs=(
            ("Tasks", len(bank.members)),
            (
                "Bases",
                f"{len(bank.bases)}" if settings.max_bases is None else f"{len(bank.bases)} of at most {settings.max_bases}",
            ),
            (
                "Bytes",
                gigabytes(bank.nbytes)
                if settings.max_bytes is None
                else f"{gigabytes(bank.nbytes)} of at most {gigabytes(settings.max_bytes)}",
            ),
            ("Inside a basis", str(settings.inner.get("name"))),
            ("A new vector joins from", "halfway" if settings.join is None else settings.join),
            ("Vectors of", "the tangent space" if bank.space == "tangent" else "weights"),
        )
    )
    blocks: list[Block] = [facts]
    over = (
        [] if settings.max_bytes is None or bank.nbytes <= settings.max_bytes else ["The bank takes more bytes than its budget."]
    )
    over += (
        []
        if settings.max_bases is None or len(bank.bases) <= settings.max_bases
        else ["The bank has more bases than its budget."]
    )
    if over:
        blocks.append(Notes(texts=tuple(over), tone="warning"))
    if problems is None:
        blocks.append(
            Notes(texts=("The files were not read: make the report without --quick, or run `thetau basis show --verify`.",))
        )
    elif problems:
        blocks.append(Notes(texts=problems, tone="bad"))
    else:
        blocks.append(Notes(texts=(f"All {len(bank.bases)} files hold what was written.",), tone="good"))
    return Section(slug="budget", title="Budget and state", blocks=tuple(blocks))


def _clusters(bank: Bank) -> Section:
    names, gram = bank.known()
    norms = gram.diagonal().clamp(min=0).sqrt()
    cosine = (gram / norms[:, None] / norms[None, :]).tolist()
    blocks: list[Block] = [
        Heatmap(
            title="Cosines of the task vectors, by basis",
            rows=tuple(names),
            columns=tuple(names),
            values=tuple(tuple(None if math.isnan(value) else max(-1.0, min(1.0, value)) for value in row) for row in cosine),
            signed=True,
            top=1.0,
            groups={name: basis.members for name, basis in bank.bases.items()},
            spec=".2f",
            caption="Each basis is framed. Hatched: the inner product cannot be known, since a vector was gone when the other came.",
        )
    ]
    bases = list(bank.bases)
    if len(bases) > 1:
        similarity = bank.similarity
        blocks.append(
            Heatmap(
                title="Cosines of the bases",
                rows=tuple(similarity.names),
                columns=tuple(similarity.names),
                values=tuple(map(tuple, similarity.cosine.tolist())),
                signed=True,
                top=1.0,
                spec=".2f",
                cluster=len(bases) > 12,
            )
        )
    spectrum = bank.state.spectrum
    if spectrum is not None:
        blocks.append(
            Lines(
                title="Spectrum of the last clustering",
                x="k",
                y="eigenvalue of the Laplacian",
                series={"eigenvalue": spectrum.eigenvalues, "gap after it": spectrum.gaps},
                caption="The largest gap after k eigenvalues speaks for k clusters.",
            )
        )
    return Section(slug="clusters", title="Clusters", blocks=tuple(blocks))


def _bases(bank: Bank) -> Section:
    table = Table(
        title="Bases",
        columns=(
            Column(name="basis", number=False),
            Column(name="how", number=False),
            Column(name="tasks"),
            Column(name="members", number=False),
            Column(name="norm"),
            Column(name="bytes"),
            Column(name="error", spec=".1e", meaning="relative error of its last writing in a compressed form"),
            Column(
                name="slack",
                spec=".2e",
                meaning="the most that it can differ from the merge of its members in one go, as a length",
            ),
        ),
        rows=tuple(
            (name, basis.how, len(basis.members), ", ".join(basis.members), basis.norm, basis.nbytes, basis.error, basis.slack)
            for name, basis in bank.bases.items()
        ),
    )
    return Section(slug="bases", title="Bases", blocks=(table,))


def _members(bank: Bank) -> Section:
    table = Table(
        title="Members",
        columns=(
            Column(name="task", number=False),
            Column(name="basis", number=False),
            Column(name="‖τ‖"),
            Column(name="‖τ‖/‖θ₀‖", spec=".3g"),
            Column(name="from", number=False),
            Column(name="fingerprint", number=False),
        ),
        rows=tuple(
            (
                name,
                member.basis,
                member.norm,
                member.norm / bank.state.base_norm if bank.state.base_norm else None,
                _shown(member.source),
                f"{member.fingerprint[:16]}…",
            )
            for name, member in bank.members.items()
        ),
    )
    return Section(slug="members", title="Members", blocks=(table,))


def _history(bank: Bank) -> Section:
    rows = tuple(
        (
            place,
            one.kind,
            ", ".join(one.names),
            one.read,
            one.written,
            one.seconds,
            _drift(one.drift),
            " ".join(one.said),
        )
        for place, one in enumerate(bank.state.log, 1)
    )
    table = Table(
        title="History",
        columns=(
            Column(name="step"),
            Column(name="change", number=False),
            Column(name="tasks", number=False),
            Column(name="bytes read"),
            Column(name="bytes written"),
            Column(name="seconds", spec=".3g"),
            Column(
                name="drift", spec=".1e", meaning="how far the bases are from an offline build with the same members, at most"
            ),
            Column(name="said", number=False),
        ),
        rows=rows,
    )
    return Section(slug="history", title="History", blocks=(table,))


def _drift(drift: Mapping[str, Any] | None) -> float | None:
    same = (drift or {}).get("same_members")
    return max((float(one) for one in same.values()), default=0.0) if isinstance(same, Mapping) else None
