"""How far a trained policy has gone from its data, and whether its Q can be believed there: a table, and a picture.

D is the data, pi the policy as it is evaluated, Q the mean of the run's critics in the units it learned in.
States are in standard deviations of D, actions in [-1, 1], discrete ones one-hot. A fifth of D's episodes (of fewer
than ten: of short pieces) is left out of all that is fitted or searched. At their states, three actions are compared:
`data` is D's own, `policy` is pi(s), `random` is drawn uniformly, of discrete ones among the legal. The numbers of
`data` are the scale. `visits` are the (s, a) of pi's own episodes in the environment.

    G           sum_t gamma^t r_t from a visit on, beyond the time limit, until gamma^t < 0.01; none if cut before
    S           standard deviation of the discounted returns-to-go in D: what Q has to tell apart
    Q above     share of Q(s, a) > max(r_max, r_max / (1 - gamma)) + S / 10, r_max the highest reward in D: too high to
                be true
    critics     mean of max_i Q_i(s, a) - min_i Q_i(s, a), their disagreement: of twins |Q_1 - Q_2|, of one critic none
    distance    d(s, a) = min_{j in near(s)} |a - a_j|,  near(s): the 10 states of D nearest to s
    covered     share of d(s, a) <= its 0.95 quantile for `data`;  visits covered: of distances to D's nearest pair
    taken       for discrete actions, in the place of distance and covered: share of the a that one of near(s) took
    surprise    -sum_j log beta_j(b_j(a) | s),  b_j: the bin of a's entry j, of 15;  beta: a network fitted to D. Of
                discrete actions -log beta(a | s); in KL and TV, too, a is then one entry, with a bin for each action
    typical     share of surprises <= their 0.95 quantile for `data`
    KL          sum_j sum_b p_jb log(p_jb / beta_jb),  p: the bins' masses under the actor's own distribution, each to
                within 1/256
    TV          1/2 sum_b |p_jb - beta_jb|, the total variation, averaged over j
    w(s, a)     p / (1 - p) = d_pi(s, a) / d_D(s, a),  p: the probability of a visit that a classifier gives, to which
                visits and data are as frequent
    accuracy    its share of right answers on episodes that it has not seen; 0.5 is chance. Under `data`: the same for
                the best tenth of D's episodes against the others
    speaking    N (sum w)^2 / (n sum w^2) min(1, mean w), n left-out data: how many of all N transitions speak of pi

Alarming is: more than 10% of Q too high to be true; Q above G by S / 2 on average; critics that disagree more than
twice as much as about `data`; fewer than 80% covered or typical, where `data` has 95%, or a share taken below 84% of
`data`'s, the same ratio; fewer than 100 transitions that speak, whose mean has an error of a tenth of their standard
deviation.

Limits. An alarm says that the data cannot vouch for the policy, not that it is bad. A report without alarms has found
nothing, which means little where `random` passes, too: the data cover every action. Distances mean less the more
dimensions there are, `taken` the fewer actions. beta takes the action's entries for independent. For actors without a
distribution (BC, TD3+BC, those that choose among candidates, as BCQ's, of discrete actions all but IQL's) p is 1 in one
bin. This makes KL and TV large even for a good clone of noisy data, so they have no verdict. Nor has accuracy: the best
policy is far from mixed data. A Q above G is no error where rewards grow beyond what D has seen. Q may be of another
policy than pi: those of IQL, SQL, XQL and IDQL are of a better one,
CQL's and COMBO's of the actor with its noise, MOPO's has penalties and entropies in it, MOBILE's penalties. S is small
where episodes are short pieces. The picture's Q over training is what the script logged: CQL of all three kinds of
action, TD3+BC of data and policy, IQL, BCQ and scripts for discrete actions of data. BC and AWR have no Q. Without an
environment there are no visits.

Run: python -m benchmarks.shift_report runs/first --out shift.png
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parent))
import shift_measures as measures
from scratch import replace
from shift_actions import bins_of, count_bins, draw_random, masses_of_policy, masses_of_random
from trained_run import Trained, Visits, load_run, visit

from common.command_line import check, launch

NUM_REFERENCES = 50_000  # transitions among which neighbours are looked for
NUM_NEIGHBOURS = 10
MOST_CHOICES = 1_000  # discrete actions: a one-hot vector of each transition is held
COLUMNS = "data", "policy", "random", "visits"
LOGGED = {  # columns of metrics.csv, and whose actions they are about
    "critic/q_data": "data",
    "critic/q": "batches",  # the data's, but in MOPO and MOBILE mostly rollouts of their models
    "critic/q_policy": "policy",
    "actor/q": "policy",
    "critic/q_random": "random",
    "critic/q_model": "rollouts of the model",
}


@dataclass
class Args:
    run_dir: tyro.conf.Positional[Path]
    """folder of a finished run"""
    out: Path | None = None
    """write the picture here, as PNG"""
    script: Path | None = None
    """path of the script that trained the run, if it is not in algorithms/"""
    env_id: str | None = None
    """environment to play in; default: that of the run"""
    num_states: int = 2_000
    """states of the data at which the policy is asked, and visits that are looked at"""
    eval_episodes: int = 10
    """episodes of the policy in the environment, if there is one; 0: none"""
    num_updates: int = 1_000
    """gradient steps of the behaviour model and of the classifiers"""


class Row(NamedTuple):
    """A line of the table: numbers by column, and of those that are judged, whether they pass the limit."""

    name: str
    values: dict[str, float]
    form: str = ".4g"
    limit: str = ""
    alarming: Mapping[str, bool] = MappingProxyType({})


def judged(name: str, values: dict[str, float], form: str, limit: str, is_alarming: Callable[[float], bool]) -> Row:
    """A row with verdicts on the policy's number and on the visits', if it has them."""
    verdicts = {name: is_alarming(value) for name, value in values.items() if name in ("policy", "visits")}
    return Row(name, values, form, limit, verdicts)


Panels = dict[str, dict[str, Tensor]]  # what the picture shows: for each panel, numbers [n] by column
Findings = tuple[list[Row], Panels]


class Scene(NamedTuple):
    """What is compared: pi at states of the data that are left out, and where pi went."""

    run: Trained
    visits: Visits | None
    points: Tensor  # [N, observation_dim + action_dim] of the whole data, in standard deviations; of choices one-hot
    visited: Tensor  # [n, the same] of the visits
    episodes: Tensor  # [N], their numbers
    left_out: Tensor  # [N], a mask
    rows: Tensor  # of some of the transitions left out, in random order
    others: Tensor  # of some of the transitions that are not
    actions: dict[str, Tensor]  # at the states of `rows`, by column

    def states(self, rows: Tensor) -> Tensor:
        return self.points[rows, : self.run.buffer.observation_dim]


def set_scene(run: Trained, visits: Visits | None, num_states: int) -> Scene:
    """Raises BadInput if there is too little data to leave some out."""
    data, lengths, name = run.buffer.transitions, run.buffer.episode_lengths, run.args.dataset_id
    check(len(data.rewards) >= 100, f"{name}: {len(data.rewards)} transitions are too few for a report")
    many = run.buffer.num_actions
    check(many <= MOST_CHOICES, f"{name}: {many} actions are too many for a report: at most {MOST_CHOICES}")
    episodes = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    if len(lengths) < 10:
        episodes = torch.arange(len(episodes)) // 10  # short pieces of the few
    numbers = torch.randperm(int(episodes[-1]) + 1)
    left_out = torch.isin(episodes, numbers[: math.ceil(len(numbers) / 5)])
    rows, others = (mask.nonzero()[:, 0] for mask in (left_out, ~left_out))
    rows, others = rows[torch.randperm(len(rows))[:num_states]], others[torch.randperm(len(others))[:NUM_REFERENCES]]
    columns = torch.cat([data.observations, run.vectors(data.actions)], dim=1)
    std, mean = torch.std_mean(columns, dim=0)
    points, visited = (columns - mean) / (std + 1e-3), torch.empty(0)
    if visits is not None:
        visited = (torch.cat([visits.observations, visits.actions], dim=1) - mean) / (std + 1e-3)
    observations = data.observations[rows]
    actions = {"data": run.vectors(data.actions[rows]), "policy": run.act(observations)}
    actions["random"] = draw_random(run, observations)
    return Scene(run, visits, points, visited, episodes, left_out, rows, others, actions)


# --- Measures -------------------------------------------------------------------------------------------------------


def judge_values(scene: Scene) -> Findings:
    """Q: its level, what is impossible in it, its error, and how far its critics agree."""
    run, visits, data = scene.run, scene.visits, scene.run.buffer.transitions
    if run.critic is None:
        return [], {}
    episodes = data.rewards.split(run.buffer.episode_lengths.tolist())
    spread = float(torch.cat([measures.discounted_returns(rewards, run.gamma) for rewards in episodes]).std())
    highest = float(data.rewards.max())
    possible = max(highest, highest / max(1 - run.gamma, 1e-9)) + spread / 10
    states = data.observations[scene.rows]
    q = {name: run.q(states, actions) for name, actions in scene.actions.items()}  # [critics, n]
    if visits is not None:
        q["visits"] = run.q(visits.observations, visits.actions)
    mean = {name: values.mean(dim=0) for name, values in q.items()}
    rows = [Row("Q", {name: float(values.mean()) for name, values in mean.items()})]
    shares = {name: float((values > possible).float().mean()) for name, values in mean.items()}
    rows.append(judged(f"Q above {possible:.4g}", shares, ".1%", "at most 10%", lambda share: share > 0.1))
    panels: Panels = {}
    if visits is not None and bool(visits.returns.isfinite().any()):
        known = visits.returns.isfinite()
        came, believed = visits.returns[known], mean["visits"][known]
        bias = float((believed - came).mean()) / max(spread, 1e-9)
        rows.append(Row("G", {"visits": float(came.mean())}))
        name = f"(Q - G) / S, S {spread:.4g}"
        rows.append(judged(name, {"visits": bias}, ".2f", "at most 0.5", lambda bias: bias > 0.5))
        panels["returns"] = {"came": came, "believed": believed}
    if len(q["data"]) > 1:
        panels["critics"] = {name: values.amax(dim=0) - values.amin(dim=0) for name, values in q.items()}
        apart = {name: float(values.mean()) for name, values in panels["critics"].items()}
        rows.append(judged("critics", apart, ".4g", "at most twice data", lambda value: value > 2 * apart["data"]))
    return rows, panels


def judge_actions(scene: Scene, num_updates: int) -> Findings:
    """pi's actions at the data's states: how they are to those of near states, and their odds among all."""
    run, data, rows, others = scene.run, scene.run.buffer.transitions, scene.rows, scene.others
    _, near = measures.nearest(scene.states(rows), scene.states(others), NUM_NEIGHBOURS)
    actions = run.vectors(data.actions[others])
    compare = taken_near if run.buffer.num_actions else distance_to_near
    found, panel = compare(scene.actions, actions[near])
    bins = bins_of(run, actions)
    beta = measures.fit_behaviour(scene.states(others), bins, count_bins(run), num_updates)(scene.states(rows))
    surprises = {name: measures.surprise(beta, bins_of(run, some)) for name, some in scene.actions.items()}
    observations = data.observations[rows]
    masses = {"policy": masses_of_policy(run, observations, scene.actions["policy"])}
    masses["random"] = masses_of_random(run, observations)
    return [
        *found,
        Row("surprise", {name: float(values.mean()) for name, values in surprises.items()}),
        covered("typical", surprises),
        Row("KL", {name: float(measures.kl_divergence(some, beta).mean()) for name, some in masses.items()}),
        Row("TV", {name: float(measures.total_variation(some, beta).mean()) for name, some in masses.items()}),
    ], {"near": panel, "surprise": surprises}


def distance_to_near(actions: dict[str, Tensor], near: Tensor) -> tuple[list[Row], dict[str, Tensor]]:
    """d(s, a) from the actions of near states [n, neighbours, action_dim]."""
    distances = {name: (some[:, None] - near).norm(dim=2).amin(dim=1) for name, some in actions.items()}
    medians = {name: float(values.median()) for name, values in distances.items()}
    return [Row("distance (median)", medians), covered("covered", distances)], distances


def taken_near(actions: dict[str, Tensor], near: Tensor) -> tuple[list[Row], dict[str, Tensor]]:
    """Whether a choice is one of those at near states [n, neighbours, C], and the share of these that took it, [n]."""
    shares = {name: (some[:, None] * near).sum(dim=2).mean(dim=1) for name, some in actions.items()}
    taken = {name: float((values > 0).float().mean()) for name, values in shares.items()}
    return [judged("taken", taken, ".1%", "at least 84% of data", lambda share: share < 0.84 * taken["data"])], shares


def covered(name: str, values: dict[str, Tensor]) -> Row:
    """Shares of the values that are at most the 0.95 quantile of the data's."""
    shares = {column: measures.coverage(some, values["data"]) for column, some in values.items()}
    return judged(name, shares, ".1%", "at least 80%", lambda share: share < 0.8)


def judge_visits(scene: Scene, num_updates: int) -> Findings:
    """Where pi goes: the distance to the data's nearest pair (s, a), and the ratio of densities there."""
    if scene.visits is None:
        return [], {}
    points, left_out, unseen = scene.points, scene.left_out, scene.visits.episodes % 3 == 0
    some = scene.visited[torch.randperm(len(scene.visited))[: len(scene.rows)]]
    compared = {"data": points[scene.rows], "visits": some}
    distances = {name: measures.nearest(x, points[scene.others], 1)[0][:, 0] for name, x in compared.items()}
    net = measures.fit_classifier(points[~left_out], scene.visited[~unseen], num_updates)
    log_ratios = {"data": net(points[left_out]), "visits": net(scene.visited[unseen])}
    speaking = len(points) * measures.effective_share(log_ratios["data"])
    accuracy = {"data": best_apart(scene, num_updates), "visits": measures.accuracy(*log_ratios.values())}
    return [
        covered("visits covered", distances),
        Row("accuracy", accuracy, ".1%"),
        judged("speaking", {"visits": speaking}, ",.0f", "at least 100", lambda number: number < 100),
    ], {"ratio": log_ratios}


def best_apart(scene: Scene, num_updates: int) -> float:
    """The accuracy with which the tenth of the episodes that has the highest returns is told from the others."""
    count = int(scene.episodes[-1]) + 1
    returns = torch.zeros(count).index_add_(0, scene.episodes, scene.run.buffer.transitions.rewards)
    best = returns.argsort(descending=True)[: max(2, count // 10)]
    ones, unseen = torch.isin(scene.episodes, best), torch.isin(scene.episodes, best[::2])
    net = measures.fit_classifier(scene.points[~ones & ~scene.left_out], scene.points[ones & ~unseen], num_updates)
    return measures.accuracy(net(scene.points[~ones & scene.left_out]), net(scene.points[unseen]))


# --- Report ---------------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> Iterator[str]:
    yield f"{'':<22}" + "".join(f"{column:>12}" for column in COLUMNS)
    for row in rows:
        cells = "".join(f"{format(row.values[name], row.form) if name in row.values else '':>12}" for name in COLUMNS)
        verdicts = ", ".join(f"{name} {'ALARMING' if bad else 'fine'}" for name, bad in row.alarming.items())
        yield f"{row.name:<22}{cells}" + (f"   {verdicts} (limit: {row.limit})" if verdicts else "")


def headlines(rows: list[Row]) -> Iterator[str]:
    for column, where in (("policy", "at the data's states"), ("visits", "where the policy goes")):
        verdicts = {row.name: row.alarming[column] for row in rows if column in row.alarming}
        if verdicts:
            names = "; ".join(name for name, bad in verdicts.items() if bad)
            yield f"alarming {where}: {sum(verdicts.values())} of {len(verdicts)}" + (f" ({names})" if names else "")


def draw(run: Trained, rows: list[Row], panels: Panels, path: Path) -> None:
    """The page of pictures, complete or not at all."""
    from matplotlib import rcParams  # slow to import, and not always needed
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # a name may hold a $
    figure = Figure(figsize=(14, 8), layout="constrained")
    title = f"{run.args.algorithm} on {run.args.dataset_id}, seed {run.args.seed}"
    figure.suptitle("\n".join([title, *headlines(rows)]))
    axes = figure.subplots(2, 3).flatten()
    draw_training(axes[0], run)
    draw_returns(axes[1], panels.get("returns", {}))
    discrete = run.buffer.num_actions > 0
    titles = {
        "critics": ("disagreement of the critics", "max Q - min Q"),
        "near": ("actions at near states", "share that took it" if discrete else "distance to the nearest"),
        "surprise": ("surprise under the fitted behaviour", "-log beta(a | s)"),
        "ratio": ("visits against data", "log of the ratio of densities, w"),
    }
    for axis, (name, (title, label)) in zip(axes[2:], titles.items(), strict=True):
        axis.set(title=title, xlabel=label, ylabel="share of the states")
        draw_shares(axis, panels.get(name, {}))
    replace(path, lambda file: figure.savefig(file, dpi=120, format="png"))


COLOURS = {"data": "tab:blue", "policy": "tab:red", "random": "tab:gray", "visits": "tab:orange"}


def draw_training(axes: Any, run: Trained) -> None:
    axes.set(title="Q over training", xlabel="updates", ylabel="mean Q")
    for name, column in LOGGED.items():
        rows = [row for row in run.metrics if {"step", name} <= row.keys()]
        if rows and not (name == "actor/q" and "critic/q_policy" in rows[0]):
            steps, values = zip(*((row["step"], row[name]) for row in rows), strict=True)
            style = {"linewidth": 3, "alpha": 0.5} if column in ("data", "batches") else {"linewidth": 1}
            axes.plot(steps, values, label=column, color=COLOURS.get(column, "black"), **style)
    if axes.lines:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "this script logs no Q", ha="center", transform=axes.transAxes)


def draw_returns(axes: Any, returns: dict[str, Tensor]) -> None:
    axes.set(title="Q where the policy goes", xlabel="discounted return that came, G", ylabel="Q")
    if not returns:
        axes.text(0.5, 0.5, "no critic, or no G", ha="center", transform=axes.transAxes)
        return
    axes.scatter(returns["came"], returns["believed"], s=4, color=COLOURS["visits"], linewidths=0, rasterized=True)
    axes.axline((float(returns["came"].mean()),) * 2, slope=1, color="black", linewidth=1, label="Q = G")
    axes.legend()


def draw_shares(axes: Any, values: dict[str, Tensor]) -> None:
    """Histograms of [n] numbers by column, of what lies between the 1st and the 99th percentile of each."""
    if not values:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        return
    ends = torch.tensor([0.01, 0.99])
    low, high = zip(*(some.float().quantile(ends).tolist() for some in values.values()), strict=True)
    for name, some in values.items():
        weights = torch.full((len(some),), 1 / len(some))
        bins = {"bins": 40, "range": (min(low), max(*high, min(low) + 1e-6)), "histtype": "step"}
        axes.hist(some.clamp(min(low), max(high)), weights=weights, label=name, color=COLOURS[name], **bins)
    axes.legend()


def main(args: Args) -> None:
    for name, least in (("num_states", 50), ("num_updates", 1), ("eval_episodes", 0)):
        value = getattr(args, name)
        check(value >= least, f"--{name.replace('_', '-')} {value}: must be at least {least}")
    check(args.eval_episodes != 1, "--eval-episodes 1: must be at least 2, one of them to test the classifier, or 0")
    if args.out is not None:
        check(args.out.suffix.lower() == ".png", f"--out {args.out}: must end with .png")
        check(args.out.parent.is_dir(), f"--out {args.out}: there is no folder {args.out.parent}")
    run = load_run(args.run_dir, args.script, args.env_id)
    torch.manual_seed(0)
    torch.set_flush_denormal(True)  # a classifier that is always right ends with gradients that slow a CPU many times
    visits = visit(run, args.eval_episodes)
    scene = set_scene(run, visits, args.num_states)
    rows: list[Row] = []
    panels: Panels = {}
    judges = judge_values(scene), judge_actions(scene, args.num_updates), judge_visits(scene, args.num_updates)
    for found, shown in judges:
        rows, panels = rows + found, panels | shown
    print(f"{run.args.algorithm} on {run.args.dataset_id}, seed {run.args.seed}: {args.run_dir}\n")
    for line in table(rows):
        print(line)
    if run.critic is None:
        print(f"skipped, for {run.args.algorithm} has no critic: Q and critics")
    elif "critics" not in panels:
        print(f"skipped, for {run.args.algorithm} has one critic: critics")
    if visits is None:
        print(f"skipped, for {'there is no environment' if args.eval_episodes else 'nothing is played'}: visits")
    elif run.critic is not None and "returns" not in panels:
        print("skipped, for every episode was cut too soon to know it: G")
    print("", *headlines(rows), sep="\n")
    if args.out is not None:
        draw(run, rows, panels, args.out)
        print(f"picture: {args.out}")


if __name__ == "__main__":
    launch(main, Args)
