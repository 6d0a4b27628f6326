"""Who is dispatched to an engine next, who is refused, and who makes way. Pure over a clock; one per engine.

The caller offers a request, asks who is :meth:`Scheduler.ready` whenever something has changed, and tells what becomes
of those it has dispatched.

Order: classes strictly; within a class the tenant that was served least (``fair``); within a tenant who is due first,
then who came first. The first that finds no room stops all: nobody overtakes it, so that a large request is not starved
by small ones. A low request that has waited ``ageing_s`` stands among the medium ones; one below high that has may be
served as high, and those paused go on, within ``floor``.

Costs: O(log n) for each request, amortised, n those that wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count

from aim_kserve.identity.caller import QosClass

from .deadlines import Before, Deadlines, retry_after
from .fair import W_IN, W_OUT
from .floor import Floor
from .ledger import Ledger
from .lengths import Lengths
from .policy import QosPolicy
from .queue import Queue
from .request import CLASSES, Ask, Rejected
from .ticket import Ticket
from .ttft import Ttft

#: A victim is replayed so often at most.
_MOST_REPLAYS = 2
#: How often it is looked whether high still burns its budget, and whether those paused have caught up with their floor.
_LOOK_S, _PAUSED_S = 1.0, 0.05


class Scheduler:
    """Args:
    policy: classes, tenants, deadlines.
    clock: seconds; never goes back.
    slots: answers that the engine computes side by side.
    kv_tokens: tokens that its KV cache holds; None: unknown, slots alone count.
    parks: the engine pauses a running request for a more urgent one while its slots are taken.
    lengths, ttft: how long answers become and when first tokens come, if anything is known of it already.
    burns: whether high burns its error budget, so that ``policy.enforcement`` is to be carried out.
    """

    def __init__(
        self,
        policy: QosPolicy,
        clock: Callable[[], float],
        *,
        slots: int,
        kv_tokens: int | None = None,
        parks: bool = False,
        lengths: Lengths | None = None,
        ttft: Ttft | None = None,
        burns: Callable[[], bool] = lambda: False,
    ) -> None:
        self._policy, self._clock, self._burns = policy, clock, burns
        self.lengths = lengths or Lengths()
        self.ttft = ttft or Ttft(self.lengths, clock)
        self._ledger = Ledger(policy, clock, slots=slots, kv_tokens=kv_tokens, parks=parks, lengths=self.lengths)
        self._deadlines = Deadlines(policy, self.ttft)
        self._floor = Floor(policy.floor, policy.ageing_s)
        self._queue = Queue(policy)
        self._enforces = policy.enforcement is not None
        self._most_waiting = {name: policy.of(name).max_waiting for name in CLASSES}
        self._running: dict[int, Ticket] = {}
        self._expired: list[Ticket] = []
        self._making_way: Ticket | None = None
        self._blocked: Ticket | None = None
        self._to_prefill = 0  # prompt tokens of those that run and have no first token yet
        self._numbers = count(1)

    # --- a request's way ----------------------------------------------------------------------------------------

    def offer(self, ask: Ask) -> Ticket:
        """Its place in the queue.

        Raises:
            Rejected: ``too_large``, ``queue_full``, ``throttled``, ``deadline``; nothing has been queued.
        """
        ticket, _ = self._admitted(ask)
        self._wait(ticket)
        return ticket

    def begin(self, ask: Ask) -> Ticket:
        """:meth:`offer`, and dispatched at once (``running``; not among those ready) where nobody waits and there is
        room without anybody making way. Raises as it does."""
        ticket, crowds_out = self._admitted(ask)
        share = self._throttled().get(ticket.level) if self._enforces else None
        if (
            not crowds_out
            and not self._queue.size
            and self._ledger.fits(ticket, ticket.level, share=share, pause=False)
        ):
            # By the figure that admitted it, it is not too late now.
            self._queue.fair[ticket.level].start_at_once(ticket)
            self._run(ticket, ticket.level, ticket.arrived_s)
        else:
            self._wait(ticket)
        return ticket

    def _admitted(self, ask: Ask) -> tuple[Ticket, bool]:
        """One that is not queued yet, and whether another one has lost its place to it."""
        ticket = Ticket(next(self._numbers), ask, self._clock(), ask.qos_class, prompt_tokens=ask.prompt_tokens)
        ticket.expected_tokens = self._ledger.expected_tokens(ask)
        if (why := self._ledger.too_large(ask)) is not None:
            raise Rejected("too_large", why, None)
        if self._enforces and self._throttled().get(ask.qos_class) == 0:
            raise Rejected(
                "throttled", f"class {ask.qos_class} is not served while high is late", retry_after(60, ticket)
            )
        full = self._queue.count_of[ask.qos_class] >= self._most_waiting[ask.qos_class]
        crowding = self._refuse_if_full(ticket) if full else None
        self._deadlines.admit(ticket, self._before)
        if crowding is not None:
            self._drop(crowding, self._full(crowding))
        return ticket, crowding is not None

    def ready(self) -> list[Ticket]:
        """Those to be dispatched now, each of them once; from now on they count as running."""
        now_s, dispatched = self._clock(), list[Ticket]()
        for ticket in self._deadlines.past(now_s):
            self._give_up(ticket, now_s)
        throttled = self._throttled()
        if "low" not in throttled:
            self._queue.age(now_s)
        self._blocked = None
        while (turn := self._turn(now_s)) is not None:
            ticket, served_as = turn
            if (why := self._ledger.too_large(ticket.ask)) is not None:
                self._drop(ticket, Rejected("too_large", why, None))
            elif not self._ledger.fits(
                ticket, served_as, share=throttled.get(ticket.level), pause=not self._floor.owes(now_s)
            ):
                self._blocked = ticket
                break
            elif self._deadlines.hopeless(ticket, self.running(), now_s):
                self._give_up(ticket, now_s)
            else:
                self._dispatch(ticket, served_as, now_s)
                dispatched.append(ticket)
        return dispatched

    def expired(self) -> list[Ticket]:
        """Those that were dropped since it was last asked, because their deadline cannot be kept any more, or their
        place went to another tenant: ``Ticket.rejected`` says why."""
        dropped, self._expired = self._expired, []
        return dropped

    def counted(self, ticket: Ticket, prompt_tokens: int, cached_tokens: int) -> None:
        """The engine has counted its prompt, and found so many of its tokens cached."""
        if ticket.state != "running":
            return
        self._charge(ticket, W_IN * self._count(ticket, prompt_tokens, cached_tokens))
        self._ledger.update(ticket)

    def first_token(self, ticket: Ticket) -> None:
        """Its first token has come: its prompt is computed."""
        if ticket.state != "running" or ticket.first_token_s is not None or ticket.dispatched_s is None:
            return
        ticket.first_token_s = now_s = self._clock()
        self._to_prefill -= ticket.uncached_tokens
        self.ttft.prefilled(ticket.to_prefill + ticket.uncached_tokens, now_s - ticket.dispatched_s)
        if ticket.prediction is not None and not ticket.replays:
            self.ttft.observe(ticket.prediction, now_s - ticket.arrived_s)

    def progress(self, ticket: Ticket, tokens: int) -> None:
        """So many tokens have been delivered so far, of all its answers together."""
        more = tokens - ticket.delivered
        if ticket.state != "running" or more <= 0:
            return
        ticket.delivered = tokens
        self._charge(ticket, W_OUT * more)
        each = -(-tokens // ticket.ask.choices)
        if each > ticket.expected_tokens:
            ticket.expected_tokens = max(each, self._ledger.expected_tokens(ticket.ask, each))
            self._ledger.update(ticket)

    def settle(self, ticket: Ticket, prompt_tokens: int, cached_tokens: int, tokens: int, *, ok: bool) -> None:
        """:meth:`counted` (0 prompt tokens: the engine has not), :meth:`progress` and :meth:`done` in one: what it
        holds is set free anyway."""
        if ticket.state != "running":
            return
        prompt = self._count(ticket, prompt_tokens, cached_tokens) if prompt_tokens else 0
        answers = tokens - ticket.delivered
        if answers > 0:
            ticket.delivered = tokens
        else:
            answers = 0
        self._charge(ticket, W_IN * prompt + W_OUT * answers)
        if ok:
            self._learn(ticket)
        self._stop(ticket)
        ticket.state = "ended"

    def done(self, ticket: Ticket, ok: bool) -> None:
        """It has ended. ok: as it should; its length and pace then count for predictions."""
        if ok and ticket.state == "running":
            self._learn(ticket)
        self.cancel(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Its client has gone, wherever it stands; of one that has ended nothing changes."""
        if ticket.state == "waiting":
            self._queue.remove(ticket)
        elif ticket.state == "running":
            self._stop(ticket)
        ticket.state = "ended"

    # --- making way ---------------------------------------------------------------------------------------------

    def blocked(self) -> Ticket | None:
        """The one at which :meth:`ready` stopped, because there is no room for it."""
        return self._blocked if self._blocked is not None and self._blocked.state == "waiting" else None

    def victim(self, ticket: Ticket) -> Ticket | None:
        """Who should be aborted and replayed (:meth:`requeue`) so that this one, which is :meth:`blocked`, can run: of
        the least urgent the one that came last. None: nobody, or the last victim has not been requeued or ended yet.

        Only one that has sent nothing, has no deadline and was not a victim twice is taken, and only where all of them
        together would make room.
        """
        if (
            not self._policy.replay
            or self._ledger.parks
            or ticket is not self.blocked()
            or self._making_way is not None
        ):
            return None
        rank = CLASSES.index(ticket.level)
        able = [each for each in self._running.values() if _may_make_way(each, rank)]
        if not able or not self._ledger.would_fit(ticket, able):
            return None
        self._making_way = max(able, key=lambda each: (CLASSES.index(each.served_as), each.arrived_s, each.number))
        return self._making_way

    def requeue(self, ticket: Ticket) -> None:
        """A victim was aborted before it sent anything: it waits again, at the place of its arrival, and its tenant
        does not pay twice."""
        if ticket.state != "running":
            return
        self._charge(ticket, -W_IN * ticket.uncached_tokens - W_OUT * ticket.delivered)
        self._stop(ticket)
        ticket.state, ticket.dispatched_s, ticket.first_token_s, ticket.delivered = "waiting", None, None, 0
        ticket.served_as = ticket.level
        ticket.replays += 1
        self._wait(ticket)

    def resize(self, slots: int, kv_tokens: int | None) -> None:
        """The engine has other capacity now; what runs there keeps its own. 0 slots: nothing is dispatched."""
        self._ledger.resize(slots, kv_tokens)

    def next_wake_s(self) -> float | None:
        """In how many seconds :meth:`ready` must be asked again though nothing happens; None: never."""
        times = [self._deadlines.next_s(), self._queue.ages_s("medium"), self._queue.ages_s("low")]
        now_s = self._clock()
        ahead = [time - now_s for time in times if time is not None and time > now_s]
        if len(self._queue) and self._throttled():
            ahead.append(_LOOK_S)
        if self.blocked() is not None and self._ledger.parks and self._floor.owes(now_s):
            ahead.append(_PAUSED_S)
        return min(ahead, default=None)

    # --- what is shown ------------------------------------------------------------------------------------------

    def waiting(self) -> Mapping[tuple[QosClass, str], int]:
        """How many wait, by class and tenant."""
        return self._queue.counts

    def running(self) -> list[Ticket]:
        """Those dispatched that have not ended, earliest dispatched first."""
        return list(self._running.values())

    @property
    def ledger(self) -> Ledger:
        """What is taken of the engine; to be read only."""
        return self._ledger

    def served(self, level: QosClass) -> Mapping[str, float]:
        """What was done for each tenant in that class, by weight, in tokens: the virtual counters."""
        return self._queue.fair[level].counters()

    # --- inside -------------------------------------------------------------------------------------------------

    def _turn(self, now_s: float) -> tuple[Ticket, QosClass] | None:
        """Whose turn it is, and as which class; None: nobody waits."""
        overdue = self._queue.overdue(now_s)
        if overdue is not None and self._floor.owes(now_s):
            return overdue, "high"
        return self._queue.head()

    def _dispatch(self, ticket: Ticket, served_as: QosClass, now_s: float) -> None:
        self._queue.start(ticket)
        self._run(ticket, served_as, now_s)

    def _run(self, ticket: Ticket, served_as: QosClass, now_s: float) -> None:
        ticket.to_prefill = self._to_prefill
        self._to_prefill += ticket.uncached_tokens
        ticket.state, ticket.served_as, ticket.dispatched_s = "running", served_as, now_s
        self._running[ticket.number] = ticket
        self._ledger.take(ticket)
        if served_as != ticket.level:
            self._floor.begin(ticket)
        self._charge(ticket, W_IN * ticket.uncached_tokens, now_s)

    def _count(self, ticket: Ticket, prompt_tokens: int, cached_tokens: int) -> int:
        """How many tokens more its prompt has than was thought."""
        before = ticket.uncached_tokens
        ticket.count(prompt_tokens, cached_tokens)
        more = ticket.uncached_tokens - before
        if ticket.first_token_s is None:
            self._to_prefill += more
        return more

    def _learn(self, ticket: Ticket) -> None:
        """Its length and pace."""
        each = ticket.delivered // ticket.ask.choices
        for _ in range(ticket.ask.choices):
            self.lengths.observe(ticket.ask.qos_class, each)
        if ticket.first_token_s is not None:
            self.ttft.decoded(each, self._clock() - ticket.first_token_s)

    def _charge(self, ticket: Ticket, cost: float, now_s: float | None = None) -> None:
        self._queue.fair[ticket.level].charge(ticket, cost)
        self._floor.charge(ticket, cost, self._clock() if now_s is None else now_s)

    def _stop(self, ticket: Ticket) -> None:
        """It no longer runs."""
        del self._running[ticket.number]
        if ticket.first_token_s is None:
            self._to_prefill -= ticket.uncached_tokens
        self._ledger.release(ticket)
        self._queue.fair[ticket.level].end(ticket)
        if ticket.served_as != ticket.level:
            self._floor.end(ticket)
        if self._making_way is ticket:
            self._making_way = None

    def _wait(self, ticket: Ticket) -> None:
        self._queue.push(ticket)
        self._deadlines.watch(ticket, len(self._queue))

    def _give_up(self, ticket: Ticket, now_s: float) -> None:
        """Of one that was let in and has waited in vain it is learnt that it took so long at least. One that was not
        let in is counted nowhere."""
        if ticket.prediction is not None and not ticket.replays:
            self.ttft.observe(ticket.prediction, now_s - ticket.arrived_s)
        self._drop(ticket, self._deadlines.too_late(ticket, now_s))

    def _drop(self, ticket: Ticket, why: Rejected) -> None:
        self._queue.remove(ticket)
        ticket.state, ticket.rejected = "ended", why
        self._expired.append(ticket)

    def _throttled(self) -> Mapping[QosClass, float]:
        """The share of the slots that classes may have at most while high burns its budget."""
        rule = self._policy.enforcement
        if rule is None or not self._burns():
            return {}
        return dict.fromkeys(CLASSES[CLASSES.index(rule.throttle) :], rule.share)

    def _before(self, ask: Ask) -> Before:
        """What is served before one that comes now. Those who would be paused for it do not count."""
        rank = CLASSES.index(ask.qos_class)
        prompts, choices = self._queue.ahead_of(ask, CLASSES[: rank + 1])
        ahead = Ask(ask.tenant, ask.qos_class, prompts, choices=choices)
        waiting = [Ticket(0, ahead, 0.0, ask.qos_class)] if choices else []
        running = self.running()
        if self._ledger.parks:
            running = [ticket for ticket in running if CLASSES.index(ticket.served_as) <= rank]
        return Before(waiting, running, self._ledger.may_use(ask.qos_class))

    def _refuse_if_full(self, ticket: Ticket) -> Ticket | None:
        """As many of its class wait as may. Whose place it takes: the latest of the tenant that waits there with most,
        so that one who floods a class keeps nobody else out of it. None: it need not wait.

        Raises:
            Rejected: ``queue_full``, and no other tenant has more there than its own.
        """
        if not len(self._queue) and self._ledger.fits(ticket, ticket.ask.qos_class):
            return None
        crowding = self._queue.crowding(ticket.ask, self._policy.weight)
        if crowding is None:
            raise self._full(ticket)
        return crowding

    def _full(self, ticket: Ticket) -> Rejected:
        name = ticket.ask.qos_class
        oldest = self._queue.oldest(name) or ticket
        return Rejected(
            "queue_full",
            f"{self._queue.count_of[name]} requests of class {name} wait already",
            retry_after((self._clock() - oldest.arrived_s) / 2, ticket),
        )


def _may_make_way(ticket: Ticket, rank: int) -> bool:
    """Strictly less urgent than that rank, nothing sent, nothing promised."""
    return (
        CLASSES.index(ticket.served_as) > rank
        and ticket.first_token_s is None
        and not ticket.delivered
        and ticket.deadline_s is None
        and ticket.replays < _MOST_REPLAYS
    )
