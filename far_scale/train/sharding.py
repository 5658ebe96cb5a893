"""How a run's weights, gradients and optimizer are shared out over its ranks, decided once before the engine starts."""

from __future__ import annotations

from dataclasses import dataclass

from far_scale.errors import UserError
from far_scale.hosts import host_name
from far_scale.recipe import Recipe
from far_scale.recipe_sections import DeepSpeedSection
from far_scale.train.faults.ranks import ranks_by_host
from far_scale.train.processes import Processes, gather

# Up to here a copy of the weights on every node is small beside what a rank holds anyway: the 1.3B preset has 1.37e9.
_MOST_PARAMETERS_FOR_HPZ = 1.4e9


@dataclass(frozen=True)
class Sharding:
    """What was decided.

    Attributes:
        stage: of ZeRO.
        hpz: ranks that keep a second copy of the weights among them between forward and backward, so that backward
            gathers within them alone; 1 for none.
        why: the decision in words, a line for the log.
    """

    stage: int
    hpz: int
    why: str


def choose_sharding(recipe: Recipe, parameters: int, processes: Processes) -> Sharding:
    """Decide for a run; all ranks call it, and decide the same.

    Args:
        parameters: of the model.

    Raises:
        UserError: a key of train.deepspeed does not fit the ranks or the device.
    """
    section = recipe.train.deepspeed or DeepSpeedSection()
    _check_device(section, processes)
    hosts = gather(host_name(), processes.host_group)
    hpz, why = _choose_hpz(section, recipe.train.zero_stage, parameters, hosts)
    return Sharding(recipe.train.zero_stage, hpz, f"sharding: ZeRO-{recipe.train.zero_stage}{why}")


def _check_device(section: DeepSpeedSection, processes: Processes) -> None:
    quantised = [name for name in ("zero_quantized_weights", "zero_quantized_gradients") if getattr(section, name)]
    if quantised and processes.device.type != "cuda":
        raise UserError(f"train.deepspeed.{quantised[0]}: DeepSpeed quantises on GPUs only; leave it out here")


def _choose_hpz(section: DeepSpeedSection, stage: int, parameters: int, hosts: list[str]) -> tuple[int, str]:
    """The size of hpZ's groups, and why, to go on behind the stage's name.

    Args:
        hosts: of all ranks, by rank.
    """
    asked, ranks = section.zero_hpz_partition_size, len(hosts)
    if asked != "auto":
        if ranks % asked:
            raise UserError(
                f"train.deepspeed.zero_hpz_partition_size: {asked} does not divide the {ranks} ranks; set it to a "
                "divisor, such as the ranks of a node, or to auto"
            )
        return asked, f", hpZ {asked}: as the recipe sets" if stage == 3 else ""
    if stage != 3:
        return 1, ""
    nodes = ranks_by_host(hosts)
    of_a_node = ranks // len(nodes)
    shape = f"{len(nodes)} nodes of {of_a_node} ranks, {parameters / 1e9:.2g} billion parameters"
    if len(nodes) == 1:
        return 1, ", no hpZ: one node"
    # DeepSpeed makes its groups of consecutive ranks.
    whole = ranks % of_a_node == 0
    if not whole or any(own != list(range(own[0], own[0] + of_a_node)) for own in nodes.values()):
        return 1, f", no hpZ: the {len(nodes)} nodes do not hold equally many consecutive ranks each"
    if of_a_node == 1:
        return 1, f", no hpZ: {len(nodes)} nodes of one rank"
    if parameters > _MOST_PARAMETERS_FOR_HPZ:
        return 1, f", no hpZ: {shape}, more than {_MOST_PARAMETERS_FOR_HPZ / 1e9:g}"
    return of_a_node, f", hpZ {of_a_node}: {shape}"
