"""What a model can be: what the functions of this package take."""

from typing import Any

from tpmlp.graph.graph import Graph
from tpmlp.model import MLP

Model = MLP | Graph


def check_model(model: Any) -> None:
    """Refuse what is no model."""
    if not isinstance(model, MLP | Graph):
        raise ValueError(
            f"model must be a tpmlp.MLP or a tpmlp.Graph: got a {type(model).__name__}. Make one "
            "with tpmlp.MLP(widths), and give it to value_and_grad; parameters go to the step."
        )


def check_is_chain(model: Any, name: str) -> None:
    """Refuse a Graph where only an MLP will do."""
    if isinstance(model, Graph):
        raise ValueError(
            f"model must be a tpmlp.MLP for {name}: got a Graph. A chain of dense vertices is one."
        )
