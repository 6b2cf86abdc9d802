"""A simulator that is compiled from a netlist, with vectors for what is alike in several lanes (docs/simulation.md)."""
