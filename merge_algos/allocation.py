"""Where the bytes of a basis go: over all modules, one candidate each, the least error of whole adapters within one budget."""

import heapq
from collections.abc import Iterator, Mapping, Sequence

from merge_algos.survey import Candidate, Options, Survey, even_bytes

Choice = dict[str, Candidate]
Cost = tuple[int, float, Candidate]  # bytes, loss
Costs = Mapping[str, Sequence[Cost]]  # module -> by rising bytes


def allocate(surveys: Mapping[str, Survey], options: Options) -> Choice:
    """One candidate per module, together at most `budget` of the inputs' bytes; with `p`, whatever that takes.

    What is made small is the sum over tasks of the adapter's squared error over its squared norm. Compared are: the
    steepest steps on the convex hulls of all candidates, the same of each codec alone, and each codec spread evenly; so the
    choice is never worse than a single codec, evenly spread or not.

    That holds although a survey leaves out the even share R of a codec that it knows to be beaten. Such a codec has nothing but
    R and nothing at all for a module. All its R together fit the budget, so alone, however spread, it takes in each module R
    or, where that is better, nothing. In place of a missing R its plans get D, the best candidate of at most the even share:
    its loss is at most that of the candidate that beat R, and all D together fit too. So each plan with D is, module by
    module, no worse than the one it replaces, and it is among those compared.
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
        shares = {module: even_bytes(options, survey.input_bytes) for module, survey in surveys.items()}
        alone = {module: _alone(costs[module], codec, share) for module, share in shares.items()}
        yield _spread(alone, budget)
        yield {module: _even(alone[module], share) for module, share in shares.items()}


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


def _alone(rows: Sequence[Cost], codec: str, share: int) -> list[Cost]:
    """What there is of one codec; where its even share was left out, also the best of at most as many bytes."""
    own = [row for row in rows if row[2].codec == codec]
    if any(row[2].budget_bytes == share for row in own):
        return own
    return sorted([*own, min((row for row in rows if row[0] <= share), key=lambda row: row[1])], key=lambda row: row[:2])


def _even(rows: Sequence[Cost], share: int) -> Candidate:
    """What the codec made of this module's even share, or what beats it."""
    own = (candidate for _, _, candidate in rows if candidate.budget_bytes == share)
    return next(own, rows[-1][2])


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


def _fill(costs: Costs, chosen: dict[str, Cost], left: int) -> Choice:
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


def _slope(hull: Sequence[Cost], at: int) -> float:
    (bytes_now, loss_now, _), (bytes_next, loss_next, _) = hull[at], hull[at + 1]
    return (loss_now - loss_next) / (bytes_next - bytes_now)


def _hull(rows: Sequence[Cost]) -> list[Cost]:
    """The lower convex hull of loss over bytes: strictly rising bytes, strictly falling loss and slope."""
    hull: list[Cost] = []
    for row in rows:
        if hull and (row[1] >= hull[-1][1] or row[0] == hull[-1][0]):
            continue
        while len(hull) > 1 and _slope([hull[-2], hull[-1]], 0) <= _slope([hull[-1], row], 0):
            hull.pop()
        hull.append(row)
    return hull
