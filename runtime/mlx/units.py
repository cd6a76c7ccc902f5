"""Steps of one token of each of some sequences, in units that run ahead of the host, and are confirmed one by one.

Unit u computes the experts of the u-th layer that has some, counted from 1, and all that follows up to the router of
the next; unit 0 begins with the embedding, and the last unit ends with the logits. A unit is queued with the table of
where records are at that moment, before the host knows which experts the unit before it chose. When it knows, the unit
is confirmed if all of them were in the table. If one was not, what is queued is void: the record is read, and the unit
is queued again, a replay.

This is exact. A confirmed unit was computed from a confirmed one, by records that were in memory when it was queued and
have not left: no read ahead evicts records of layers that are queued, and a read that may evict any voids all that is
queued. A void unit writes nothing but keys, values and states of the step's own position, which its replay writes
again. What it computes does not depend on the window, the number of units queued and not confirmed.
"""

import mlx.core as mx
import numpy as np

from ...devices.mlx.experts import Array
from .by_layer import ByLayer, CheckWanted, count, uses_of
from .forward import Forward
from .records import Records, Use
from .spans import Span, State

WINDOW = 1  # one layer more costs more in void units than it hides


class Units:
    """The forward pass of such steps.

    window: how many units are queued beyond the one that is confirmed; 0: none. units, replays, read_backs: how many
    were queued, how often what was queued became void, and how often the host waited for values of the device.
    """

    def __init__(self, forward: Forward, records: Records, by_layer: ByLayer):
        self._forward, self._records, self._by_layer = forward, records, by_layer
        self.window = WINDOW
        self.units = self.replays = self.read_backs = 0

    def results(self, spans: list[Span], check_wanted: CheckWanted, ahead: bool) -> list:
        """Forward.results(). ahead: records that may be needed soon are read meanwhile."""
        records, step = self._records, Step(self._forward, self._records, spans, ahead)
        if whole := records.holds_all():
            for unit in range(len(step.layers) + 1):
                step.queue(unit)
        else:
            self._confirm(step, check_wanted)
        self.units += step.queued
        self.read_backs += 1
        mx.eval(step.results, [past.arrays() for span in spans for past in span.timeline.pasts])
        for number, layer in enumerate(step.layers if whole else []):
            step.tick(layer)
            records.take(layer, uses_of(spans, step.chosen(number)))
            records.release()
        step.tick(self._forward.layers.stop)
        return step.results

    def _confirm(self, step: "Step", check_wanted: CheckWanted) -> None:
        """Queue all units and confirm all but the last one."""
        records, last = self._records, len(step.layers)
        step.queue(0)
        after = 1  # the unit to be queued next
        for number, layer in enumerate(step.layers):
            while after <= last and after - number <= self.window:
                records.protect(layer, step.layers[after - 1] + 1)
                step.queue(after)
                after += 1
            self.read_backs += 1
            chosen = step.chosen(number)
            check_wanted()
            step.tick(layer)
            records.read_ahead([])  # too late for what is not being read yet
            uses, guesses = uses_of(step.spans, chosen), step.guesses(number)
            if after == number + 1 or not step.were_there(number + 1, uses):
                void = step.states[number + 1 : after]
                self.replays += bool(void)

                def begun(number=number, void=void, guesses=guesses) -> None:
                    guesses[:0] = step.experts_of(number + 1, void)
                    records.read_ahead(guesses)

                records.protect(layer, layer + 1)
                if len(records.take(layer, uses, begun if step.ahead and void else None)) == len(uses):
                    step.queue(number + 1)
                    records.release()
                else:
                    records.release()
                    mx.eval([state.arrays for states in step.states for state in states])
                    step.queue(number + 1, self._by_layer.sums(layer, step.spans, step.states[number], chosen))
                after = number + 2
            else:
                records.take(layer, uses)
                records.release()
            if guesses:
                records.read_ahead(guesses)


class Step:
    """The units of one step. states: what each unit that is queued has made of the spans."""

    def __init__(self, forward: Forward, records: Records, spans: list[Span], ahead: bool):
        self._forward, self._records, self.spans, self.ahead = forward, records, spans, ahead
        self.layers = [layer for layer in forward.layers if forward.config.has_experts(layer)]
        self.states: list[list[State]] = []
        self.results: list = []
        self.queued, self._ticks = 0, forward.layers.start
        self._tables: dict[int, np.ndarray] = {}  # by unit
        self._looks: dict[int, list[Array]] = {}  # by unit, what the router after its own chooses at present

    def queue(self, unit: int, sums: list[Array] | None = None) -> None:
        """Queue a unit, in the place of those from it on. sums: of the experts that it begins with."""
        its = self._forward
        first = its.layers.start
        if unit == 0:
            states = its.entered(self.spans)
        else:
            layer, before = self.layers[unit - 1], self.states[unit - 1]
            if sums is None:
                self._tables[unit] = self._records.pages(layer)
                pages, arena = mx.array(self._tables[unit]), self._records.arena
                sums = [its.experts(layer, state, arena, pages) for state in before]
            states = [its.with_experts(layer, *each) for each in zip(before, sums, strict=True)]
            first = layer + 1
        last = unit == len(self.layers)
        for layer in range(first, its.layers.stop if last else self.layers[unit] + 1):
            states = [its.attended(layer, *each) for each in zip(self.spans, states, strict=True)]
            if not its.config.has_experts(layer):
                states = [its.without_experts(layer, state) for state in states]
        if last:
            self.results = its.results(self.spans, states)
        else:
            states = [its.routed(self.layers[unit], *each) for each in zip(self.spans, states, strict=True)]
            if self.ahead and unit + 1 < len(self.layers):
                each = zip(self.spans, states, strict=True)
                self._looks[unit] = [its.route(self.layers[unit + 1], span, state.x)[0] for span, state in each]
        self.states[unit:] = [states]
        mx.async_eval([state.arrays for state in states], self._looks.get(unit, []), self.results if last else [])
        self.queued += 1

    def chosen(self, number: int) -> list[np.ndarray]:
        """The experts that each span has in a unit, which are counted. Waits for the unit."""
        return [count(*each) for each in zip(self.spans, self.states[number], strict=True)]

    def were_there(self, unit: int, uses: list[Use]) -> bool:
        """Whether a unit was queued with a table that has the records of all these experts."""
        return all(self._tables[unit][use.expert] >= 0 for use in uses)

    def guesses(self, number: int) -> list[tuple[int, int]]:
        """The experts (layer, expert) that a unit that is computed makes probable."""
        ids = [np.array(one) for one in self._looks.get(number, [])]
        return [(self.layers[number + 1], int(expert)) for one in ids for expert in one.reshape(-1) if expert >= 0]

    def experts_of(self, first: int, void: list[list[State]]) -> list[tuple[int, int]]:
        """The experts that void units from the `first` on chose. Waits for these units."""
        found = []
        for unit, states in enumerate(void, start=first):
            ids = [np.array(state.ids).reshape(-1) for state in states if state.ids is not None]
            found += [(self.layers[unit], int(expert)) for one in ids for expert in one if expert >= 0]
        return found

    def tick(self, layers: int) -> None:
        """So many layers have been computed."""
        for _ in range(layers - self._ticks):
            self._records.residency.tick()
        self._ticks = layers
