"""What a damped optimizer puts into a checkpoint beside its base's, and takes out of one, also of an older version."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nsgd.curvature.checks import plain, shown
from nsgd.damping.damage import DAMAGED, check_followed_flag, check_shape, check_tensors, checked_counts
from nsgd.directions.directions import clamped
from nsgd.directions.kept import DIRECTIONS, FIRST_PASS, LAST, ROWS_OF, blank
from nsgd.directions.shards import from_saved, same_everywhere, to_save
from nsgd.options import PER_GROUP, DampingOptions, check_factors

if TYPE_CHECKING:
    from nsgd.damping.step import Damped

# Options that one optimizer has once.
SHARED = tuple(field.name for field in fields(DampingOptions) if field.name not in PER_GROUP)

_IN_GROUP = ("nsgd_version", "nsgd_options", "nsgd_counts")  # of the first group
_VERSION = 2  # 1, of release 0.1.0, had every option in every group and the counts beside them; it is read, not written
_OWN = (DIRECTIONS, ROWS_OF, LAST, FIRST_PASS)  # by parameter


class Loaded(NamedTuple):
    """A checkpoint, taken apart."""

    plain: dict[str, Any]  # what is the base optimizer's
    options: DampingOptions | None  # None where there are none: a checkpoint of the base optimizer
    counts: dict[str, Any]
    tensors: dict[Any, dict[str, Tensor]]  # by the numbers of parameters


def group_key(optimizer: Damped, name: str) -> str:
    """The name of an option in a group: its own, unless the base optimizer has an option of that name."""
    return f"nsgd_{name}" if f"nsgd_{name}" in optimizer.defaults else name


def packed(optimizer: Damped, saved: dict[str, Any]) -> dict[str, Any]:
    """The base optimizer's state, with that of its directions: tensors by parameter, values in the first group."""
    directions = optimizer._directions
    counts, tensors = directions.saved()
    if _is_announced(optimizer):
        tensors = blank(directions.options, directions.blocks, whole=True)
    places = {id(p): n for n, p in enumerate(_params(optimizer))}
    counts["followed"] = sorted(places[identity] for identity, entry in tensors.items() if DIRECTIONS in entry)
    if "rows" in counts:
        counts["rows"]["absent"] = sorted(places[identity] for identity in counts["rows"]["absent"])
    options = asdict(directions.options)
    if options["basis_dtype"] is not None:
        options["basis_dtype"] = str(options["basis_dtype"]).removeprefix("torch.")
    # One value, whatever is in it: torch.distributed.checkpoint takes lists to pieces, and wants as many on loading.
    written = json.dumps(counts)
    saved["param_groups"][0].update(nsgd_version=_VERSION, nsgd_options=options, nsgd_counts=written)
    for group in saved["param_groups"]:
        for key in (group_key(optimizer, name) for name in ("gamma", "bulk_scale")):
            group[key] = float(group[key])  # of any library's numbers, as torch.load takes them
    extra = {}
    for i, p in zip(_numbers(saved), _params(optimizer), strict=True):
        if id(p) in tensors:
            saved_tensors = {name: to_save(value, p) for name, value in tensors[id(p)].items()}
            extra[i] = {**saved["state"].get(i, {}), **saved_tensors}
    saved["state"] = {**saved["state"], **extra}
    return saved


def announce(optimizer: Damped) -> None:
    """Name what a checkpoint would hold in the state and the groups of an optimizer that has made no step yet.

    ``torch.distributed.checkpoint`` has a fresh optimizer step once at a rate of 0, and loads into it what it has then,
    in ``state_dict()``, or, flattened, in ``state`` and ``param_groups``. Tensors are made in ``state_dict()`` alone.
    """
    directions = optimizer._directions
    if not directions.is_new:
        return
    optimizer.param_groups[0].update(dict.fromkeys(_IN_GROUP))
    names = blank(directions.options, directions.blocks, whole=False)
    for p in _params(optimizer):
        if id(p) in names:
            optimizer.state[p].update(dict.fromkeys(names[id(p)], torch.empty(0, device="cpu")))


def withdraw(optimizer: Damped) -> None:
    """Take the names out again, before a step: many base optimizers take any state for their own."""
    if _is_announced(optimizer):
        for name in _IN_GROUP:
            del optimizer.param_groups[0][name]
        for p, entry in list(optimizer.state.items()):
            for name in _OWN:
                entry.pop(name, None)
            if not entry:
                del optimizer.state[p]


def _is_announced(optimizer: Damped) -> bool:
    return _IN_GROUP[0] in optimizer.param_groups[0]


def unpacked(optimizer: Damped, state_dict: dict[str, Any]) -> Loaded:
    """Take a checkpoint apart; nothing is changed.

    Raises:
        ValueError: If its options are out of range or unknown, its counts are damaged, or its directions are of another
            model.
    """
    check_shape(state_dict)
    state: dict[Any, Any] = {}
    tensors: dict[Any, dict[str, Tensor]] = {}
    for i, entry in state_dict["state"].items():
        # Taken out before torch sees them: it would cast them to the parameter's dtype, and Adam takes any state for
        # its own.
        if isinstance(entry, dict) and any(name in entry for name in _OWN):
            tensors[i] = {name: entry[name] for name in _OWN if name in entry}
            entry = {name: value for name, value in entry.items() if name not in _OWN}
            if not entry:
                continue
        state[i] = entry
    groups = state_dict["param_groups"]
    key = group_key(optimizer, "curvature")
    for group in groups:
        check_followed_flag(group.get(key, True))
    first = groups[0] if groups else {}
    if "nsgd_version" in first:
        version = plain(first["nsgd_version"])
        if not isinstance(version, int) or version != _VERSION:
            raise ValueError(f"expected a checkpoint of format {_VERSION} or older, got {shown(version)}; update nsgd")
        options = _options(first.get("nsgd_options"))
        counts = checked_counts(first.get("nsgd_counts"), len(_params(optimizer)))
        ours = set(_IN_GROUP)
    elif "refreshed_at" in first:  # release 0.1.0
        options = _options({name: first[name] for name in (*SHARED, "gamma", "bulk_scale") if name in first})
        counts = {"weights": first.get("eigenvalues", []), **first}
        counts["damped"] = [weight > 0 for weight in counts["weights"]]
        ours = {*SHARED, *_COUNTS_0_1}
    else:
        options, counts, ours = None, {}, set()
    # torch says which numbers do not fit.
    numbered = zip(_numbers(state_dict), _params(optimizer), strict=False)
    check_tensors(((tensors.get(i, {}), p) for i, p in numbered), counts)
    if options is not None and (params := [p for _, p in optimizer._curvature_params()]):
        options = clamped(options, params, depth=4)
    groups = [{name: value for name, value in group.items() if name not in ours} for group in groups]
    for group, now in zip(groups, optimizer.param_groups, strict=False):
        factors = (group_key(optimizer, name) for name in ("gamma", "bulk_scale"))
        check_factors(*(group.get(key, now[key]) for key in factors))
    return Loaded({**state_dict, "state": state, "param_groups": groups}, options, counts, tensors)


_COUNTS_0_1 = (
    *("steps", "refreshed_at", "attempted_at", "refreshes", "skipped_refreshes", "hvps", "cost_gradients"),
    *("spared_gradients", "overlap", "eigenvalues", "weights", "averaged", "trace", "mean_square", "alarm"),
)


def take_over(optimizer: Damped, loaded: Loaded, before: Sequence[Mapping[str, Any]]) -> None:
    """Follow the directions of a checkpoint, once the base optimizer has loaded the rest.

    Args:
        optimizer: The optimizer.
        loaded: The checkpoint.
        before: The optimizer's groups before it, for options that a plain checkpoint lacks.
    """
    for group, saved, old in zip(optimizer.param_groups, loaded.plain["param_groups"], before, strict=True):
        for name in PER_GROUP:
            key = group_key(optimizer, name)
            if key not in saved:
                group[key] = old[key]
    directions = optimizer._directions
    if loaded.options is not None:
        directions.options = loaded.options
    directions.arrange(optimizer._curvature_params())
    numbered = zip(_numbers(loaded.plain), _params(optimizer), strict=True)
    saved_tensors = {id(p): (p, loaded.tensors[i]) for i, p in numbered if i in loaded.tensors}
    if not same_everywhere(sum(len(entry) for _, entry in saved_tensors.values()), _params(optimizer)):
        saved_tensors = {}  # as of a checkpoint that only the first process has read
    tensors = {
        i: {name: from_saved(value, p) for name, value in entry.items()} for i, (p, entry) in saved_tensors.items()
    }
    counts = loaded.counts
    if "absent" in counts.get("rows", {}):
        params = _params(optimizer)
        counts = {**counts, "rows": {**counts["rows"], "absent": [id(params[n]) for n in counts["rows"]["absent"]]}}
    directions.load(counts, tensors)


def _options(saved: Any) -> DampingOptions:
    known = {*SHARED, "gamma", "bulk_scale"}
    if not isinstance(saved, Mapping):
        raise ValueError(f"expected nsgd_options of the checkpoint to be a mapping, got {shown(saved)}; {DAMAGED}")
    if unknown := [name for name in saved if name not in known]:
        raise ValueError(
            f"expected nsgd_options of the checkpoint to be among {', '.join(sorted(known))}, got "
            f"{', '.join(map(str, unknown))}; update nsgd, or load another checkpoint"
        )
    options = dict(saved)
    if isinstance(options.get("basis_dtype"), str):
        options["basis_dtype"] = getattr(torch, options["basis_dtype"], options["basis_dtype"])
    return DampingOptions(**options)


def _numbers(state_dict: Mapping[str, Any]) -> list[Any]:
    return [i for group in state_dict["param_groups"] for i in group["params"]]


def _params(optimizer: Damped) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
