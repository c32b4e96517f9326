"""Verdict: what limits the speed of a training run, in plain words, and which recipe key acts on it."""

from __future__ import annotations

from dataclasses import dataclass

from gist_ray.training.time_spent import TimeSpent

# Shares above which a cause is worth a sentence. Rules of thumb, but for the first two: training is built to wait for
# data less than 2 % of its time, and a slow rank counts from where its delay is as large.
_DATA = 0.02
_DELAY, _SLOWER = 0.02, 1.15
_WAITING = 0.10
_GATHER = 0.10
_REDUCE = 0.15
_OPTIMIZER = 0.15
_UNTIMED = 0.10
_CHECKPOINTS = 0.03
_REPEATED = 0.05
_PADDING, _RECOMPUTED = 0.10, 0.10  # of tokens

_Cause = tuple[float, str]  # its cost as a share of the time, and what there is to say
_OWN_WORK = ("data", "forward", "loss", "backward", "optimizer")


@dataclass(frozen=True)
class RunFacts:
    """What a verdict looks at beside the phases. Shares are of 1; None was not logged."""

    padding_share: float | None = None
    recomputed_share: float | None = None
    checkpoint_share: float | None = None
    """Stalls for checkpoints, of the time of the steps."""
    steps: int = 0
    repeated_steps: int = 0
    """Done again after restarts."""
    restarts: int = 0


def explain(spent: TimeSpent | None, facts: RunFacts) -> list[str]:
    """Sentences on what costs time, the dearest first; one sentence if nothing does, or if nothing is known."""
    found = _of_the_run(facts)
    if spent:
        slow = _of_slow_ranks(spent)
        found += slow + _of_phases(spent, waiting=0.0 if slow else spent.waiting)
    if found:
        return [sentence for _, sentence in sorted(found, key=lambda cause: -cause[0])]
    if spent is None:
        return ["No times of phases were logged, so there is nothing to say about the speed."]
    computing = spent.share("forward") + spent.share("backward")
    return [f"Forward and backward take {_percent(computing)} of the step: nothing but computing limits the speed."]


def _of_the_run(facts: RunFacts) -> list[_Cause]:
    times = "once" if facts.restarts == 1 else f"{facts.restarts} times"
    repeated = facts.repeated_steps / facts.steps if facts.steps else 0.0
    twice = facts.recomputed_share or 0.0
    causes = _above(
        (facts.padding_share or 0.0, _PADDING,
         "Padding is {share} of the tokens that are computed: a larger train.length_window puts texts of one length "
         "together, a smaller train.chunk_tokens pads them to less."),
        (facts.checkpoint_share or 0.0, _CHECKPOINTS,
         "Checkpoints stall training for {share} of its time: raise train.checkpoint_steps, or set train.storage_path "
         "to faster storage."),
        (repeated, _REPEATED,
         f"Training restarted {times} and did {facts.repeated_steps:,} steps again, {{share}} of the run: a smaller "
         "train.checkpoint_steps loses less."),
    )  # fmt: skip
    if twice > _RECOMPUTED:
        # A backward costs two forwards: a forward done again costs a third more.
        causes.append((twice / (3 + twice), (
            f"{_percent(twice)} of the tokens are computed twice, because not all activations fit: raise "
            "train.activation_mb if there is memory left, or take more workers."
        )))  # fmt: skip
    return causes


def _of_slow_ranks(spent: TimeSpent) -> list[_Cause]:
    """Ranks that all others wait for, by what they do slower themselves: who waits spends it in the exchanges."""
    slow: dict[int, list[tuple[float, str]]] = {}
    for phase in spent.phases:
        slowest = phase.slowest() if phase.name in _OWN_WORK else None
        if slowest:
            rank, times = slowest
            delay = float(phase.rank_median_s[rank]) * (1 - 1 / times) / spent.step_s
            if times > _SLOWER and delay > _DELAY:
                slow.setdefault(rank, []).append((delay, f"{times:.1f}x in {phase.name}"))
    causes = []
    for rank, phases in slow.items():
        delay = sum(delay for delay, _ in phases)
        named = " and ".join(name for _, name in phases)
        causes.append((delay, (
            f"Rank {rank} is slower than the others, {named}, and they wait for it, {_percent(delay)} of the step: "
            "look at its machine (other jobs on it, fewer cores, a slower GPU, a slower disk)."
        )))  # fmt: skip
    return causes


def _of_phases(spent: TimeSpent, waiting: float) -> list[_Cause]:
    exchanges = spent.share("gather") + spent.share("reduce")
    # What the last rank to arrive spends in an exchange is the exchange itself; what others spend beyond it is waiting.
    travelling = 1 - spent.waiting / exchanges if exchanges else 0.0
    return _above(
        (spent.share("data"), _DATA,
         "Waiting for data is {share} of the step and should be next to nothing: the loader is a limit. Put the shards "
         "(output_dir) on faster storage, or leave the machine more memory to keep them in."),
        (waiting, _WAITING,
         "Ranks wait for one another for {share} of the step, in turn and not for one of them: their rows differ in "
         "length. A larger train.length_window evens them out."),
        (spent.share("gather") * travelling, _GATHER,
         "Gather takes {share} of the step: the vectors of all texts travel between the workers. A faster network, or "
         "fewer workers with more cores each, makes it less."),
        (spent.share("reduce") * travelling, _REDUCE,
         "Reduce takes {share} of the step: gradients travel once a step, however many rows it has. A larger "
         "train.batch_size, a faster network or fewer workers makes it matter less."),
        (spent.share("optimizer"), _OPTIMIZER,
         "The optimizer takes {share} of the step, however many rows it has: a larger train.batch_size makes it matter "
         "less, and train.zero_stage from 1 on divides it over the workers."),
        (spent.untimed, _UNTIMED,
         "{share} of the step is in none of the phases: work beside training, or a machine that does other jobs."),
    )  # fmt: skip


def _above(*causes: tuple[float, float, str]) -> list[_Cause]:
    """Those of (share, limit, sentence) that are above their limit."""
    return [(share, text.format(share=_percent(share))) for share, limit, text in causes if share > limit]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\xa0%" if share < 0.1 else f"{100 * share:.0f}\xa0%"
