"""From flags to a running ``AsyncLLM``. Imports vLLM, which takes many seconds: import this in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import multiprocessing
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import (
    BaseFrontendArgs,
    FrontendArgs,
    make_arg_parser,
    propagate_flash_late_interaction,
    validate_parsed_serve_args,
)
from vllm.platforms import current_platform
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from aim_runtime.engines.base import EngineStats, ModelLoadError

from .output import one_line

#: vLLM's default is 0: SIGKILL at once, which leaves GPU drivers to clean up.
SHUTDOWN_TIMEOUT_S = 5.0

#: For the engine to take what it is told: it does so between two steps.
DROP_S = 5.0

#: Flags of vLLM's own HTTP server. Ours serves instead, so they would be without effect, and ``--api-key`` without
#: effect is worse than an error.
HTTP_SERVER_FLAGS = (
    {field.name for field in dataclasses.fields(FrontendArgs)}
    - {field.name for field in dataclasses.fields(BaseFrontendArgs)}
    - {"enable_flash_late_interaction"}
) | {
    "api_server_count",
    "enable_scale_out",
    "enable_server_load_tracking",
    "enable_tokenizer_info_endpoint",
    "grpc",
    "headless",
    "model_tag",
    "sse_keep_alive_interval",
    "tokens_only",
}


class LiveStats:
    """A vLLM stat logger that keeps the scheduler's latest word: vLLM's interface, duck-typed, one for all ranks."""

    def __init__(self) -> None:
        self._waiting: dict[int, int] = {}
        self._kv_cache_usage: dict[int, float] = {}

    def __call__(self, vllm_config: Any, engine_index: int = 0) -> LiveStats:
        return self

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is not None:
            self._waiting[engine_idx] = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self._kv_cache_usage[engine_idx] = scheduler_stats.kv_cache_usage

    def log(self) -> None: ...
    def log_engine_initialized(self) -> None: ...
    def record_sleep_state(self, is_awake: int, level: int) -> None: ...

    @property
    def waiting(self) -> int:
        return sum(self._waiting.values())

    @property
    def kv_cache_usage(self) -> float | None:
        """Of the fullest data-parallel rank, 0..1."""
        return max(self._kv_cache_usage.values(), default=None)


#: What tells whether an adapter was applied; a user's own class takes its place.
WORKER_EXTENSION = "aim_runtime.engines.vllm.worker.AdapterModules"


def _nothing(timeout: float | None = None) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Built:
    """A running engine and what it was made from."""

    llm: Any
    args: Namespace
    live: LiveStats

    @property
    def max_model_len(self) -> int:
        return int(self.llm.model_config.max_model_len)

    @property
    def asks_workers(self) -> bool:
        """Whether the workers have what ``worker.py`` adds to them."""
        return bool(self.args.worker_extension_cls == WORKER_EXTENSION)

    @property
    def schedules_by_priority(self) -> bool:
        return bool(self.llm.scheduler_config.policy == "priority")

    @property
    def kv_tokens_total(self) -> int | None:
        """Tokens that the KV caches of all data-parallel ranks hold: vLLM measures it while it loads. None: a model
        without such a cache."""
        config = self.llm.vllm_config
        tokens = config.cache_config.kv_cache_size_tokens
        return int(tokens * config.parallel_config.data_parallel_size) if tokens else None

    @property
    def log_interval_s(self) -> float:
        """Seconds between vLLM's log lines; 0 if it keeps no statistics."""
        return 0.0 if self.args.disable_log_stats else float(envs.VLLM_LOG_STATS_INTERVAL)

    def unfinished(self) -> int:
        return int(self.llm.get_num_unfinished_requests())

    def stats(self) -> EngineStats:
        """The count of unfinished requests is exact. How many of them wait is what the scheduler said after its
        last step, and at least as many as cannot run: a burst shows before the next step."""
        slots = self.llm.scheduler_config.max_num_seqs * self.llm.vllm_config.parallel_config.data_parallel_size
        unfinished = self.unfinished()
        waiting = max(unfinished - slots, min(self.live.waiting, unfinished))
        usage = self.live.kv_cache_usage if unfinished else 0.0
        return EngineStats(
            *(unfinished - waiting, waiting, slots, usage if self.log_interval_s else None),
            kv_tokens_total=self.kv_tokens_total,
        )

    def sequences_of(self, request_id: str) -> list[Any]:
        """vLLM's states of what one request of ours generates: one per choice and prompt."""
        states = self.llm.output_processor.request_states.values()
        return [state for state in states if f"{state.external_req_id}-".startswith(f"{request_id}-")]

    async def drop(self, request_id: str | None) -> None:
        """Abort what is left of one request of ours; returns when vLLM's engine has let go of it, after DROP_S at the
        latest. ``abort`` itself only sends a message: the engine takes our messages one after the other, between two
        steps, so its answer to a later one says that it has taken that, too."""
        if self.llm.errored:
            return
        with contextlib.suppress(TimeoutError, EngineDeadError):
            async with asyncio.timeout(DROP_S):
                left = [state.request_id for state in self.sequences_of(request_id)] if request_id else []
                if left:
                    await self.llm.abort(left, internal=True)
                await self.llm.is_sleeping()

    async def abort_all(self) -> None:
        await self.llm.abort(list(self.llm.output_processor.request_states), internal=True)

    async def close(self) -> None:
        """Stop the engine's processes, by force after a while; returns when they are gone."""
        if self.unfinished():
            await self.abort_all()
        handler = self.llm.output_handler
        if handler is not None:  # or it takes the end of its queue for the engine's death
            handler.cancel()
            await asyncio.gather(handler, return_exceptions=True)
        await asyncio.to_thread(self.shutdown)

    def shutdown(self) -> None:
        """:meth:`close` for an engine that was never attached to a loop; blocks."""
        self.llm.shutdown(timeout=max(SHUTDOWN_TIMEOUT_S, self.llm.vllm_config.shutdown_timeout))
        self.llm.shutdown = _nothing  # its __del__ shuts down again, in an interpreter that is going away
        multiprocessing.active_children()  # reaps


def build(ours: Mapping[str, Any], flags: Sequence[str]) -> Built:
    """Parse ``flags``, add our own settings, start the engine's processes and wait for the model to be loaded.

    Raises:
        ModelLoadError: a flag is unknown, malformed, without effect here, or contradicts ``ours``.
        Exception: whatever vLLM raises.
    """
    args = parse(ours, flags)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    propagate_flash_late_interaction(args, engine_args)
    live = LiveStats()
    llm = AsyncLLM.from_vllm_config(
        engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER),
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=args.enable_log_requests,
        aggregate_engine_logging=args.aggregate_engine_logging,
        disable_log_stats=args.disable_log_stats,
        # A custom logger switches statistics on, so there is none where they were switched off.
        stat_loggers=None if args.disable_log_stats else [live],
    )
    return Built(llm, args, live)


def parse(ours: Mapping[str, Any], flags: Sequence[str]) -> Namespace:
    """vLLM's own parser, strict: no abbreviations, no unknown flags, no flags without effect.

    Raises:
        ModelLoadError: names the flag.
    """
    parser = make_arg_parser(FlexibleArgumentParser(add_help=False, allow_abbrev=False))
    parser.error = _refuse
    args: Namespace = parser.parse_args(list(flags))

    def given(name: str) -> bool:
        return bool(getattr(args, name, None) != parser.get_default(name))

    for name in sorted(HTTP_SERVER_FLAGS):
        if given(name):
            _refuse(f"{_spelled(name)} belongs to vLLM's own HTTP server and has no effect in this one: remove it")
    for name, value in ours.items():
        if given(name) and getattr(args, name) != value:
            _refuse(f"{_spelled(name)} {getattr(args, name)} contradicts the runtime's own setting {value}")
        setattr(args, name, value)
    _complete(args)
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        _refuse(one_line(error))
    return args


def _complete(args: Namespace) -> None:
    """Our defaults where vLLM's are not what anybody wants."""
    if current_platform.is_cpu() and args.dtype == "auto":
        args.dtype = "float32"  # without AVX-512 bfloat16 falls back to slow paths
    if args.enable_lora and not args.worker_extension_cls:
        args.worker_extension_cls = WORKER_EXTENSION


def _spelled(name: str) -> str:
    return "--" + name.replace("_", "-")


def _refuse(message: str) -> NoReturn:
    raise ModelLoadError(f"vLLM's engine arguments: {message}")
