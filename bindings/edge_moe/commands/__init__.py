"""The subcommands of `edge-moe`, a file each: its options, and a function that parses, calls the library and prints.

Imports of the library sit in the functions: what `generate` does not need would count under its cap.
"""
