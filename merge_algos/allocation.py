"""Where the bytes of a basis go: over all modules, one candidate each, the least error of whole adapters within one budget."""

import heapq
from collections.abc import Iterator, Mapping, Sequence

from merge_algos.survey import Candidate, Options, Survey, even_bytes

Choice = dict[str, Candidate]
Costs = Mapping[str, Sequence[tuple[int, float, Candidate]]]  # module -> (bytes, loss, candidate) by rising bytes


def allocate(surveys: Mapping[str, Survey], options: Options) -> Choice:
    """One candidate per module, together at most `budget` of the inputs' bytes; with `p`, whatever that takes.

    What is made small is the sum over tasks of the adapter's squared error over its squared norm. Compared are: the
    steepest steps on the convex hulls of all candidates, the same of each codec alone, and each codec spread evenly; so the
    choice is never worse than a single codec, evenly spread or not.
    """
    if options.p is not None:
        return {module: survey.candidates[-1] for module, survey in surveys.items()}
    budget = int(options.budget * sum(survey.input_bytes for survey in surveys.values()))
    loss = _task_weights(surveys)
    plans = [*_plans(surveys, _costs(surveys, loss, options.codecs), options, budget)]
    return min(plans, key=lambda plan: sum(_loss(candidate, loss) for candidate in plan.values()))


def _plans(surveys: Mapping[str, Survey], costs: Costs, options: Options, budget: int) -> Iterator[Choice]:
    yield _spread(costs, budget)
    for codec in options.codecs:
        alone = {module: [cost for cost in rows if cost[2].codec == codec] for module, rows in costs.items()}
        yield _spread(alone, budget)
        yield {module: _even(alone[module], even_bytes(options, survey.input_bytes)) for module, survey in surveys.items()}


def _task_weights(surveys: Mapping[str, Survey]) -> list[float]:
    """Per task one over the squared norm of its adapter; 0 for an adapter that is zero."""
    totals = [sum(norms) for norms in zip(*(survey.norms for survey in surveys.values()), strict=True)]
    return [1.0 / total if total > 0 else 0.0 for total in totals]


def _loss(candidate: Candidate, weights: Sequence[float]) -> float:
    return sum(weight * error for weight, error in zip(weights, candidate.errors, strict=True))


def _costs(surveys: Mapping[str, Survey], weights: Sequence[float], names: Sequence[str]) -> Costs:
    return {
        module: sorted(
            ((c.size_bytes, _loss(c, weights), c) for c in survey.candidates if c.codec in names), key=lambda cost: cost[:2]
        )
        for module, survey in surveys.items()
    }


def _even(rows: Sequence[tuple[int, float, Candidate]], budget_bytes: int) -> Candidate:
    """What the codec made of this module's even share."""
    return next(candidate for _, _, candidate in rows if candidate.budget_bytes == budget_bytes)


def _spread(costs: Costs, budget: int) -> Choice:
    """From the cheapest candidates upwards, always the step that saves most loss per byte; then whatever still fits."""
    hulls = {module: _hull(rows) for module, rows in costs.items()}
    place = dict.fromkeys(costs, 0)
    left = budget - sum(hull[0][0] for hull in hulls.values())
    steps = [(-_slope(hull, 0), module) for module, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, module = heapq.heappop(steps)
        hull, at = hulls[module], place[module]
        if hull[at + 1][0] - hull[at][0] > left:
            continue
        left -= hull[at + 1][0] - hull[at][0]
        place[module] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(steps, (-_slope(hull, at + 1), module))
    return _fill(costs, {module: hull[place[module]] for module, hull in hulls.items()}, left)


def _fill(costs: Costs, chosen: dict[str, tuple[int, float, Candidate]], left: int) -> Choice:
    """Spend what is left on the upgrades that save most, also those off the hull."""
    while True:
        upgrades = [
            (now[1] - row[1], module, row)
            for module, now in chosen.items()
            for row in costs[module]
            if row[0] - now[0] <= left and row[1] < now[1]
        ]
        if not upgrades:
            return {module: candidate for module, (_, _, candidate) in chosen.items()}
        _, module, row = max(upgrades, key=lambda upgrade: upgrade[0])
        left -= row[0] - chosen[module][0]
        chosen = {**chosen, module: row}


def _slope(hull: Sequence[tuple[int, float, Candidate]], at: int) -> float:
    (bytes_now, loss_now, _), (bytes_next, loss_next, _) = hull[at], hull[at + 1]
    return (loss_now - loss_next) / (bytes_next - bytes_now)


def _hull(rows: Sequence[tuple[int, float, Candidate]]) -> list[tuple[int, float, Candidate]]:
    """The lower convex hull of loss over bytes: strictly rising bytes, strictly falling loss and slope."""
    hull: list[tuple[int, float, Candidate]] = []
    for row in rows:
        if hull and (row[1] >= hull[-1][1] or row[0] == hull[-1][0]):
            continue
        while len(hull) > 1 and _slope([hull[-2], hull[-1]], 0) <= _slope([hull[-1], row], 0):
            hull.pop()
        hull.append(row)
    return hull
