"""Runs `edge-moe` as `python -m edge_moe`."""

from edge_moe.cli import main

if __name__ == "__main__":
    main()
