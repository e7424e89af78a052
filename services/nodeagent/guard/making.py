"""Puts the guard together from the settings."""

import sys
from pathlib import Path

from devices.api import Inventory
from services.nodeagent.broker_client import BrokerClient
from services.nodeagent.effects.starting import engine_environment
from services.nodeagent.guard.accounts import Accounts
from services.nodeagent.guard.compute import compute_of
from services.nodeagent.guard.enforcing import Guard
from services.nodeagent.guard.proof import Program, Proof
from services.nodeagent.holder_client import HolderClient
from services.nodeagent.settings import NodeAgentSettings


def guard_of(settings: NodeAgentSettings, inventory: Inventory, holder: HolderClient) -> Guard:
    """This host's guard; with a live proof and with the memory broker where the settings say so."""
    state_dir = Path(settings.state_dir)
    proof = None
    if settings.isolation_probe_s > 0:
        python = settings.engine_python or sys.executable
        program = Program(python=python, environment=engine_environment(), deadline_s=settings.isolation_probe_s)
        proof = Proof(holder, program, kept=state_dir / "guard-proofs.json")
    accounts = None
    if settings.broker_socket:
        accounts = Accounts(
            BrokerClient(settings.broker_socket),
            engine_socket=settings.broker_engine_socket,
            secret_path=state_dir / "broker-secret",
        )
    pipe_dir = Path(settings.mps_pipe_dir) if settings.mps_pipe_dir else (state_dir / "mps").resolve()
    compute = compute_of(settings.compute_sharing, program=settings.mps_control, pipe_dir=pipe_dir)
    return Guard(inventory, settings, proof=proof, accounts=accounts, compute=compute)
