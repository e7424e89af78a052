"""`python -m engines training`: arguments and routes."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from engines.http import Changes, errors_as_bodies, json_response, serve
from engines.model.sharing import SHARING_MODES
from engines.mps import sharing_from
from engines.process import Log, Parser, add_common_arguments, count, die_with_parent, positive
from engines.prometheus import Page
from engines.training.checkpoints import Checkpoints
from engines.training.job import Job, JobSettings, JobState

if TYPE_CHECKING:
    import argparse

DESCRIPTION = """\
A training job: it fills its memory budget, makes steps that change real bytes in device memory, writes checkpoints and
resumes from the newest. Asked to sleep it finishes its step and frees the GPU; awake again it makes the very next one.
"""
VERSION = "0.1.0-training"
# From one process's kernels to another's without MPS: about an H100's (engines/model/models.json).
SWITCH_S = 60e-6


def parser() -> Parser:
    built = Parser(prog="python -m engines training", description=DESCRIPTION)
    add_common_arguments(built)
    built.add_argument(
        "--checkpoint-dir", required=True, type=Path, metavar="DIR", help="where checkpoints go; made if missing"
    )
    built.add_argument("--step-s", default=0.2, type=positive, metavar="S", help="length of a step (default: 0.2)")
    built.add_argument(
        "--gpu-sharing",
        choices=SHARING_MODES,
        help="what engines on one GPU do to each other (default: mps when the environment names an MPS daemon)",
    )
    built.add_argument(
        "--checkpoint-every", default=50, type=count, metavar="N", help="steps between checkpoints (default: 50)"
    )
    return built


class Routes:
    """Handlers over one job."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._changes = Changes()

    def add_to(self, app: web.Application) -> None:
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/version", self.version)
        app.router.add_get("/is_sleeping", self.is_sleeping)
        app.router.add_post("/sleep", self.sleep)
        app.router.add_post("/wake_up", self.wake_up)
        app.router.add_get("/sublet/state", self.state)

    async def health(self, _: web.Request) -> web.Response:
        """200 while the job is alive, asleep too; 503 while it loads and after it failed."""
        return web.Response(status=200 if self._job.state in {JobState.RESIDENT, JobState.ASLEEP} else 503)

    async def metrics(self, _: web.Request) -> web.Response:
        job = self._job
        labels = {"model_name": job.settings.model}
        page = Page()
        page.value(
            "sublet_training_steps_total",
            "counter",
            "Steps, resumed ones too.",
            job.progress.step_count,
            labels,
        )
        page.value("sublet_training_resumed_steps", "gauge", "Steps from a checkpoint.", job.resumed_step_count, labels)
        page.value("sublet_training_checkpoints_total", "counter", "Checkpoints written.", job.checkpoint_count, labels)
        page.value("sublet_training_held_bytes", "gauge", "Device memory held, context too.", job.held_bytes, labels)
        page.value(
            "sublet_training_neighbour_seconds_total",
            "counter",
            "Time that steps took longer because of other engines on the GPU.",
            job.pace.slowed_s,
            labels,
        )
        page.value("sublet_training_asleep", "gauge", "1 while asleep.", int(job.is_asleep), labels)
        page.value("sublet_engine_info", "gauge", "What it runs on.", 1, {**labels, "device": job.device_label})
        return web.Response(text=page.text(), content_type="text/plain", charset="utf-8")

    async def version(self, _: web.Request) -> web.Response:
        return json_response({"version": VERSION, "engine": "sublet-training"})

    async def is_sleeping(self, _: web.Request) -> web.Response:
        return json_response({"is_sleeping": self._job.is_asleep})

    async def sleep(self, _: web.Request) -> web.Response:
        return json_response(await self._changes.finish(self._job.sleep()))

    async def wake_up(self, _: web.Request) -> web.Response:
        return json_response(await self._changes.finish(self._job.wake()))

    async def state(self, _: web.Request) -> web.Response:
        job = self._job
        return json_response(
            {
                "state": job.state.value,
                "transition": job.transition,
                "failure": job.failure or None,
                "engine": "training",
                "model": job.settings.model,
                "device": job.device_label,
                "in_flight": 0,
                "weights_bytes": job.memory_bytes,
                "kv_bytes": 0,
                "context_bytes": job.context_bytes,
                "held_bytes": job.held_bytes,
                "is_brokered": job.is_brokered,
                "gpus": job.shares,
                "budget_bytes": job.settings.memory_bytes,
                "weights_generation": job.progress.step_count,  # every step changes the memory
                "steps": job.progress.step_count,
                "resumed_steps": job.resumed_step_count,
                "checkpointed_steps": job.checkpointed_step_count,
                "gpu_sharing": job.pace.sharing.mode if job.pace.sees_neighbours else "alone",
            }
        )


def main(arguments: list[str]) -> int:
    """Run until a signal; the exit code."""
    options = parser().parse_args(arguments)
    if not options.outlive_parent:
        die_with_parent()
    return asyncio.run(_serve(options))


async def _serve(options: argparse.Namespace) -> int:
    log = Log(engine="training", model=options.model)
    settings = JobSettings(
        model=options.model,
        gpu_uuids=options.gpu,
        memory_bytes=options.memory_bytes,
        seed=options.seed,
        step_s=options.step_s,
        checkpoint_every=options.checkpoint_every,
        sharing=sharing_from(os.environ, mode=options.gpu_sharing, switch_s=SWITCH_S),
    )
    checkpoints = Checkpoints(options.checkpoint_dir, model=options.model, seed=options.seed)
    job = Job(settings, checkpoints=checkpoints, log=log)
    app = web.Application(middlewares=[errors_as_bodies(log)])
    Routes(job).add_to(app)
    return await serve(job, app, host=options.host, port=options.port, log=log)
