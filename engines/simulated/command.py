"""`python -m engines simulated`: arguments, the HTTP server, and the order of start and stop."""

from __future__ import annotations

import argparse
import asyncio
import os

from aiohttp import web

from engines.http import BODY_BYTES_MAX, errors_as_bodies, serve
from engines.model.batching import BatchLimits
from engines.model.catalogue import gpu_names, gpu_speed, model_parameters
from engines.model.sharing import SHARING_MODES
from engines.model.timing import TimingModel
from engines.mps import sharing_from
from engines.process import (
    Log,
    Parser,
    add_common_arguments,
    byte_count,
    count,
    die_with_parent,
    fraction,
    positive,
    seconds,
)
from engines.simulated.administration import AdministrationRoutes
from engines.simulated.engine import Engine
from engines.simulated.generation import GenerationRoutes
from engines.simulated.reports import EngineSettings

DESCRIPTION = """\
A simulated inference engine: OpenAI-compatible routes, made-up but repeatable text, modelled speed, and real device
memory with vLLM's sleep mode. It runs on whatever CUDA driver the loader finds: a real one or the software GPU.
"""


def parser() -> Parser:
    built = Parser(prog="python -m engines simulated", description=DESCRIPTION)
    add_common_arguments(built)
    built.add_argument("--weights-bytes", required=True, type=byte_count, metavar="N", help="size of the weights")
    built.add_argument(
        "--cold-start-s", default=10.0, type=seconds, metavar="S", help="simulated cold start (default: 10)"
    )
    built.add_argument(
        "--profile", default="h100-80", choices=gpu_names(), help="GPU whose speed is modelled (default: %(default)s)"
    )
    built.add_argument(
        "--gpu-sharing",
        choices=SHARING_MODES,
        help="what engines on one GPU do to each other (default: mps when the environment names an MPS daemon)",
    )
    built.add_argument(
        "--time-scale", default=1.0, type=positive, metavar="X", help="multiplies modelled step times (default: 1.0)"
    )
    built.add_argument(
        "--max-batch", default=64, type=count, metavar="N", help="sequences that run together (default: 64)"
    )
    built.add_argument(
        "--prefix-hit",
        default=0.0,
        type=fraction,
        metavar="X",
        help="part of each prompt in the prefix cache (default: 0)",
    )
    built.add_argument(
        "--stream-interval", default=1, type=count, metavar="N", help="tokens per streamed chunk (default: 1)"
    )
    return built


def application(engine: Engine, *, stream_interval: int, log: Log) -> web.Application:
    """All routes of one engine."""
    app = web.Application(middlewares=[errors_as_bodies(log)], client_max_size=BODY_BYTES_MAX)
    GenerationRoutes(engine, stream_interval=stream_interval).add_to(app)
    AdministrationRoutes(engine).add_to(app)
    return app


def main(arguments: list[str]) -> int:
    """Run until a signal; the exit code."""
    options = parser().parse_args(arguments)
    log = Log(engine="simulated", model=options.model)
    if not options.outlive_parent:
        die_with_parent()
    speed = gpu_speed(options.profile)
    assert speed is not None, options.profile
    settings = EngineSettings(
        model=options.model,
        gpu_uuids=options.gpu,
        weights_bytes=options.weights_bytes,
        memory_bytes=options.memory_bytes,
        cold_start_s=options.cold_start_s,
        seed=options.seed,
        limits=BatchLimits(sequences_max=options.max_batch, prefix_hit_fraction=options.prefix_hit),
        sharing=sharing_from(os.environ, mode=options.gpu_sharing, switch_s=speed.switch_s),
    )
    parameters = model_parameters(options.model, weights_bytes=options.weights_bytes)
    timing = TimingModel(parameters=parameters, gpu=speed, gpu_count=len(options.gpu), time_scale=options.time_scale)
    return asyncio.run(_serve(settings, timing, options, log))


async def _serve(settings: EngineSettings, timing: TimingModel, options: argparse.Namespace, log: Log) -> int:
    # The engine makes events and locks, which belong to the running loop.
    engine = Engine(settings, timing=timing, log=log)
    app = application(engine, stream_interval=options.stream_interval, log=log)
    return await serve(engine, app, host=options.host, port=options.port, log=log)
