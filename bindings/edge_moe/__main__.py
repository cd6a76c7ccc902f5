"""`python -m edge_moe` is `edge-moe`."""

from edge_moe.cli import main

if __name__ == "__main__":
    main()
