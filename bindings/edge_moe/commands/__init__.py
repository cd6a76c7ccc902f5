"""The subcommands of `edge-moe`, one per file: the options, and a function that parses, calls the library and prints.

The library is imported inside the functions: modules that `generate` does not need would count under its cap.
"""
