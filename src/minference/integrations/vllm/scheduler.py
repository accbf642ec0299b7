"""Schedulers that fail a request whose logits are NaN, and nothing else.

vLLM stops the whole engine when attention raises. With one of these schedulers, sparse attention
turns an error into NaN rows instead; they reach that request's logits through every
parallel rank, the model runner counts them, and here the request ends with an error. Pages that
were computed after the failure leave the prefix cache, and requests that share them fail too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from minference.log import get_logger

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput


class _Isolation(Scheduler):
    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """As vLLM's, after the failed requests' tokens are dropped; then ends those requests."""
        counts = model_runner_output.num_nans_in_logits or {}
        broken = {name for name, count in counts.items() if count and name in self.requests}
        if not broken:
            return super().update_from_output(scheduler_output, model_runner_output)
        failed = broken | self._evict(broken)
        get_logger(__name__).error("NaN logits: failing the requests %s", sorted(failed))
        for name in failed:
            place = model_runner_output.req_id_to_index.get(name)
            if place is not None and model_runner_output.sampled_token_ids:
                model_runner_output.sampled_token_ids[place] = []
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request in self.finish_requests(failed, RequestStatus.FINISHED_ERROR):
            result = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                events=request.take_events(),
            )
            own = outputs.setdefault(request.client_index, EngineCoreOutputs())
            # the default list of an empty struct is shared
            own.outputs = [*own.outputs, result]
        return outputs

    def _evict(self, broken: set[str]) -> set[str]:
        """Drops the broken requests' fresh pages from the prefix cache; who else reads them."""
        pages: set[int] = set()
        for name in broken:
            pages |= self._fresh_pages(self.requests[name])
        self.kv_cache_manager.evict_blocks(pages)
        return {
            request.request_id
            for request in self.running
            if pages & {page for own in self._pages(request) for page in own}
        }

    def _pages(self, request: Request) -> tuple[list[int], ...]:
        return self.kv_cache_manager.get_block_ids(request.request_id)

    def _fresh_pages(self, request: Request) -> set[int]:
        """Pages written by steps whose output has not been seen yet, the failed one the first."""
        seen = max(0, request.num_computed_tokens - request.num_in_flight_tokens)
        groups = self._pages(request)
        # groups of a hybrid model count pages of different sizes
        first = seen // self.block_size if len(groups) == 1 else 0
        return {page for own in groups for page in own[first:]}


class IsolatingScheduler(_Isolation):
    """vLLM's scheduler with isolation of failed requests."""


class IsolatingAsyncScheduler(_Isolation, AsyncScheduler):
    """vLLM's asynchronous scheduler with isolation of failed requests."""
