"""Write the card of a model directory, README.md: tools/model_card.py MODEL --license ID [--scores DIR ...]."""

from __future__ import annotations

import argparse
from pathlib import Path

from far_scale.evaluation.model_card import CardFacts, write_model_card
from far_scale.utils.command_line import command_line


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description="Write README.md of a model directory, as the hub shows it.")
    parser.add_argument("model_dir", type=Path, help="model directory, as tools/export_checkpoint.py writes it")
    license_help = "the hub's identifier of the weights' licence, such as apache-2.0"
    parser.add_argument("--license", required=True, metavar="ID", help=license_help)
    name_help = "what the card's commands load: org/name of the hub, or a path (default: MODEL_DIR as given)"
    parser.add_argument("--name", help=name_help)
    parser.add_argument("--trained-on", metavar="TEXT", help="sentences about the training data")
    run_help = "the run that the model was exported from; the card then has its hyper-parameters, without paths"
    parser.add_argument("--run", type=Path, help=run_help)
    scores_help = "folders that tools/evaluate.py wrote for this model; the card then has their scores"
    parser.add_argument("--scores", type=Path, nargs="+", default=[], metavar="DIR", help=scores_help)
    args = parser.parse_args()
    facts = CardFacts(args.license, args.name, args.trained_on, args.run, tuple(args.scores))
    print(f"{write_model_card(args.model_dir, facts)}: written")
