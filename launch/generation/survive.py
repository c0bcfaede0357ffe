"""Generation that goes on when ranks are lost, come or leave: the rounds of serve.py, over views.

All ranks keep the same ledger. When an exchange breaks, those that are left say what they hold and what they know, and
go on: sequences that nobody holds any more are begun again elsewhere, from their prompts and the tokens that were known
of them. Results are written by one rank, each once; who takes that over reads what is in the file already.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moe_runtime

from ... import metrics
from ...comm.wire import all_gather_message
from ...survival import LOST
from .batch import RunningBatch
from .ledger import Ledger, News, sink_of
from .output import Sink
from .requests import Request
from .serve import PASSES

OpenSink = Callable[[bool], tuple[Sink, set[int]]]  # (is there one already) -> it, and the lines that it has written


class SurvivingGeneration:
    """One rank's part. open_sink is called where this rank is to write the results."""

    def __init__(
        self,
        runtime: moe_runtime.Runtime,
        batch: RunningBatch,
        requests: Sequence[Request],
        open_sink: OpenSink,
    ) -> None:
        self.runtime, self._model, self._batch, self._open_sink = runtime, batch.model, batch, open_sink
        self.ledger = Ledger(requests, runtime.size)
        self.sink: Sink | None = None
        self._written: set[int] = set()  # lines that were in the file when this rank took it over
        self._since = 0  # the view in which this rank came; 0 until it has
        self._finished: list[list[Any]] = []  # results that not all ranks have
        self._said: dict[int, int] = {}  # how many tokens of its sequences the others have been told of
        self._counted = [0, 0]  # tokens and requests of this rank, for people
        if runtime.progress is not None:
            metrics.watch_progress(batch.model, runtime.progress)
        self._closed: set[int] = set()
        self._spreads = False  # a rank has come that held nothing
        self._slots: list[int] = []  # of each rank, in the latest round
        self._passes = min(PASSES, batch.settings.max_new_tokens)

    def run(self) -> bool:
        """Until every request has its result; False where this rank has been drained before."""
        here = self._enter(None) if self.runtime.joins else self._begin_or_enter()
        while here:
            try:
                if self.ledger.is_over():
                    all_gather_message(self.runtime.transport, [], "end")  # whoever writes results has written them
                    return True
                here = self._round()
            except LOST as error:
                here = self._enter(error)
        return here

    def _begin_or_enter(self) -> bool:
        try:
            self._begin()
            return True
        except LOST as error:
            return self._enter(error)

    def _enter(self, error: Exception | None) -> bool:
        """Take up the next view, or the one after it if that breaks as well."""
        while True:
            if not self.runtime.recover(self._model, error):
                return False
            try:
                self._begin()
                return True
            except LOST as again:
                error = again

    def _begin(self) -> None:
        """Bring all ranks of a view to the same ledger."""
        runtime, ledger, batch = self.runtime, self.ledger, self._batch
        batch.take_back()
        held = [sequence.number for sequence in batch.sequences()]
        new = self._since == 0
        known = ledger.known(held, self._finished, self._since or runtime.view.number, self.sink is not None)
        said = all_gather_message(runtime.transport, known.as_message(), "new view (requests)")
        fresh = ledger.begin(said)
        writer = sink_of(said)
        if writer == runtime.rank and self.sink is None:
            self.sink, self._written = self._open_sink(bool(ledger.done) or runtime.view.number > 1)
            known = [result for result in ledger.done.values() if result is not None]
            fresh = [result for result in known if result[0] not in self._written]
        if self.sink is not None:  # before anything can break: nobody gives it these again
            self.sink.take(fresh)
            self._write()
        # Who has come does not know what was done before, and a new writer may not have what was never written.
        sure = {n for n, result in ledger.done.items() if result is not None} | self._written
        ledger.agree(all_gather_message(runtime.transport, sorted(sure), "new view (results)")[writer])
        self._since = runtime.view.number if new else self._since
        self._finished, self._closed = [], set()
        self._said = {}
        came = [since == runtime.view.number for _, _, since, _ in said]
        self._spreads = self._spreads or (any(came) and not all(came))
        runtime.ready(self._model, runtime.take_notes() if runtime.rank == 0 else ())

    def _round(self) -> bool:
        runtime, ledger, batch = self.runtime, self.ledger, self._batch
        for rank, request in ledger.deal(2 * batch.settings.batch_size, self._closed):
            if rank == runtime.rank:
                tokens, logprobs = ledger.tokens.get(request.number, ((), ()))
                batch.add(request.number, request.prompt, request.max_new_tokens, tokens, logprobs)
        with torch.inference_mode(), runtime.join(self._model):
            for _ in range(self._passes):
                if not batch.held:
                    break
                ended = batch.step()
                self._finished += [[one.number, one.text, len(one.tokens), one.logprobs] for one in ended]
                self._counted[0] += sum(len(one.tokens) - self._said.pop(one.number, 0) for one in ended)
                self._counted[1] += len(ended)
        news = News(self._finished, self._new_tokens())
        message = [news.as_message(), runtime.next_view(), runtime.draining]
        if runtime.progress is not None:
            runtime.tell(metrics.collect(runtime, self._model, *self._counted))
        said = all_gather_message(runtime.transport, message, "results")
        self._finished = []
        results = ledger.take([one for one, _, _ in said])
        if self.sink is not None:
            self.sink.take(results)
            self._write()
        if all(view for _, view, _ in said):
            return self._enter(None)
        self._closed = set.intersection(*(set(closed) for _, _, closed in said))
        self._spread()
        return True

    def _write(self) -> None:
        """Others may write, too, where this process was held up for so long that they have gone on without it: then its
        agent ends it."""
        while not self.runtime.may_act():
            time.sleep(0.02)
        self.sink.write()

    def _new_tokens(self) -> list[list[Any]]:
        told = []
        for sequence in self._batch.sequences():
            before = self._said.get(sequence.number, 0)
            if len(sequence.tokens) > before:
                told.append([sequence.number, before, sequence.tokens[before:], sequence.logprobs[before:]])
                self._said[sequence.number] = len(sequence.tokens)
                self._counted[0] += len(sequence.tokens) - before
        return told

    def _spread(self) -> None:
        """Experts to ranks that have none yet, and off those that leave."""
        runtime = self.runtime
        if runtime.size > 1 and (self._spreads or self._closed):
            runtime.spread(self._model, sorted(self._closed))
        if runtime.rank != 0:
            return
        placement = runtime.view.placement
        slots = np.bincount(placement.slot_rank, minlength=runtime.size).tolist()
        if len(slots) == len(self._slots) and slots != self._slots:
            runtime.ready(self._model, [f"experts have moved: slots per rank {self._slots} before, {slots} now"])
        self._slots = slots
        for rank in self._closed:
            if not slots[rank]:
                runtime.drained(rank)


def spooled(arguments: argparse.Namespace, folder: str) -> argparse.Namespace:
    """The options with a file for the results, which whoever writes them next can go on with."""
    if arguments.output is not None:
        return arguments
    return argparse.Namespace(**{**vars(arguments), "output": Path(folder) / "answers.jsonl"})


def show(path: Path) -> None:
    """The texts of a file of results on stdout, as they are shown when there is no such file."""
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "text" in record:
            print(f"{record['prompt']}{record['text']}", flush=True)
