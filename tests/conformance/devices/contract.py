"""What every implementation of the hardware port must do: inherit `PortContract` and give a `world` fixture."""

from tests.conformance.devices.contract_inventory import InventoryContract, LimitsContract
from tests.conformance.devices.contract_memory import CopyContract, RegionContract
from tests.conformance.devices.contract_processes import CheckpointContract, SharingContract


class PortContract(
    InventoryContract, LimitsContract, RegionContract, CopyContract, SharingContract, CheckpointContract
):
    """All of it."""
